"""Scripts that build what the package ships; run from the repository root, never imported by moeless."""
