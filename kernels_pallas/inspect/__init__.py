"""Kernel costs on TPUs and GPUs that are not attached, from compiled schedules.

libtpu compiles for any TPU on any x86 Linux machine and dumps the final VLIW
schedule, about one cycle per bundle. `schedule` parses it, `chips` predicts
from it, `build` compiles our kernel and the reference in the same way.

    python -m kernels_pallas.inspect --kernel=flash_attention --target=v5p
"""
