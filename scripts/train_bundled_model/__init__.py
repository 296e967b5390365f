"""Train the bundled model, `moeless-mini`: `python -m scripts.train_bundled_model --text-dir DATA --out DIR`."""
