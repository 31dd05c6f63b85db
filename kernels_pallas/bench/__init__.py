"""Checks and times of the kernels on the chip at hand, for a day with one.

`jobs` says what a job is, `worker` runs them and `supervisor` watches it;
`attention`, `decoding`, `sequence` and `packed` are the jobs.
`kernels_pallas.bench.bench_gpu` and `bench_tpu` are the commands.
"""
