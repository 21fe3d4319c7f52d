"""The algorithms that share a sequence, a model or a cache between ranks, run for real: on CPU processes (gloo), on several
GPUs (NCCL), or as logical ranks of one process.
"""
