"""The engine around Hugging Face transformers: batching, sampling, and the experts implementation `moeless`.

Start reading at `build.build_engine`, which picks `ContinuousEngine` (paged KV cache) or `StaticBatchEngine`.
"""
