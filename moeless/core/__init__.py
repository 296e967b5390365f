"""Types, protocols and errors that cross folders. Imports nothing else of moeless, and never torch or ray."""
