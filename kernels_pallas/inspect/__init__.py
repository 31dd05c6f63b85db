"""What a kernel costs on a chip that is not here.

libtpu compiles for any TPU on any x86 Linux machine and writes down the final
VLIW schedule, about a cycle a bundle. `schedule` reads it, `chips` predicts
from it, `build` compiles our kernel and the reference in the same way.

    python -m kernels_pallas.inspect --kernel=flash_attention --target=v5p
"""
