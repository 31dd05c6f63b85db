"""Checks and benchmarks of the kernels on the attached TPU or GPU.

`jobs` defines jobs, `worker` runs them and `supervisor` watches it;
`attention`, `decoding`, `sequence` and `packed` contain the jobs.
`kernels_pallas.bench.bench_gpu` and `bench_tpu` are the commands.
"""
