"""The cells of the table of plans, and the claims that they decide.

MaxText's rates are those that its page on Llama 2 gives for 70B.
"""

from experiments.studies.planning.plan_table import Bound, Cell

CELLS = (
  Cell(
    model="Llama-2-7B",
    method="full",
    config="runs/lora/llama2_7b_full.gin",
    topology="v5p:1x1x1",
  ),
  Cell(
    model="Llama-2-7B",
    method="full",
    config="runs/lora/llama2_7b_full.gin",
    topology="h100:8",
    set=("FSDP=8", "BATCH=8"),
  ),
  Cell(
    model="Llama-2-7B",
    method="QLoRA",
    config="runs/lora/llama2_7b_qlora.gin",
    topology="v5e:1x1",
  ),
  Cell(
    model="Llama-2-7B",
    method="QLoRA",
    config="runs/lora/llama2_7b_qlora.gin",
    topology="h100:1",
  ),
  Cell(
    model="Llama-2-70B",
    method="NF4, generation",
    config="runs/plan/llama2_70b_nf4.gin",
    topology="h100:1",
    generate="1x512+256",
  ),
  Cell(
    model="Llama-3.1-8B",
    method="full",
    config="runs/plan/llama31_8b_full.gin",
    topology="v5e:16x16",
  ),
  Cell(
    model="Llama-3.1-8B",
    method="full",
    config="runs/plan/llama31_8b_full.gin",
    topology="h100:8",
    set=("BATCH=8",),
  ),
  Cell(
    model="Llama-3.1-8B",
    method="LoRA",
    config="runs/plan/llama31_8b_lora.gin",
    topology="v5e:2x2",
  ),
  Cell(
    model="Llama-3.1-8B",
    method="QLoRA",
    config="runs/plan/llama31_8b_qlora.gin",
    topology="v5e:1x1",
  ),
  Cell(
    model="Llama-3.1-8B",
    method="generation",
    config="runs/plan/llama31_8b_full.gin",
    topology="v5e:2x4",
    generate="16x1024+256",
    set=("FSDP=1", "TENSOR=8"),
  ),
  Cell(
    model="Llama-3.1-70B",
    method="full",
    config="runs/plan/llama31_70b_full.gin",
    topology="v5e:16x16",
  ),
  Cell(
    model="Llama-3.1-70B",
    method="full",
    config="runs/plan/llama31_70b_full.gin",
    topology="v5p:4x4x4",
  ),
  Cell(
    model="Llama-3.1-70B",
    method="LoRA",
    config="runs/plan/llama31_70b_lora.gin",
    topology="h100:8",
  ),
  Cell(
    model="Llama-3.1-70B",
    method="QLoRA",
    config="runs/plan/llama31_70b_qlora.gin",
    topology="h100:1",
  ),
  Cell(
    model="LLaDA-8B",
    method="pre-training",
    config="runs/llada/pretrain_8b.gin",
    topology="v5e:16x16",
  ),
  Cell(
    model="LLaDA-8B",
    method="fine-tuning",
    config="runs/llada/sft_8b.gin",
    topology="v5e:8x8",
  ),
  Cell(
    model="LLaDA-8B",
    method="sampling",
    config="runs/llada/pretrain_8b.gin",
    topology="v5e:2x4",
    fill="16x1024+256",
    set=("FSDP=1", "TENSOR=8"),
  ),
  Cell(
    model="Qwen3-30B-A3B",
    method="full",
    config="runs/plan/qwen3_30b_a3b_full.gin",
    topology="v5p:4x4x4",
  ),
  Cell(
    model="SmolVLM-256M",
    method="all",
    config="runs/vlm/recipe_smolvlm_256m.gin",
    topology="v5e:4x4",
    stage="all",
  ),
  Cell(
    model="LLaVA-1.5-7B",
    method="align",
    config="runs/vlm/recipe_llava15_7b.gin",
    topology="v5e:4x8",
    stage="align",
  ),
  Cell(
    model="LLaVA-1.5-7B",
    method="tune",
    config="runs/vlm/recipe_llava15_7b.gin",
    topology="v5e:4x8",
    stage="tune",
  ),
  Cell(
    model="Llama-3.1-8B and a 72B PRM",
    method="search",
    config="runs/plan/llama31_8b_full.gin",
    topology="v5p:2x2x2",
    verifier="runs/plan/prm_72b.gin",
    search="4x16x512+1024",
    scored=16,
    set=("FSDP=1", "TENSOR=8"),
  ),
)

BOUNDS = (
  Bound(
    claim="L2: all of Llama-2-7B takes over 100 GB to train",
    cell="Llama-2-7B, full, v5p:1x1x1",
    field="bytes",
    least=100000000000.0,
  ),
  Bound(
    claim="L2: QLoRA trains Llama-2-7B in 24 GB",
    cell="Llama-2-7B, QLoRA, h100:1",
    field="bytes",
    most=24000000000.0,
  ),
  Bound(
    claim="Q2: Llama-2-70B in NF4 generates in 35 to 40 GB",
    cell="Llama-2-70B, NF4, generation, h100:1",
    field="bytes",
    least=35000000000.0,
    most=40000000000.0,
  ),
  Bound(
    claim="an 8B step for v5e:16x16 is compiled in 2 minutes of one core",
    cell="Llama-3.1-8B, full, v5e:16x16",
    field="cpu_seconds",
    most=120.0,
  ),
  Bound(
    claim="MaxText trains a 70B model with 57% MFU on v5e-256: under the bound",
    cell="Llama-3.1-70B, full, v5e:16x16",
    field="mfu_bound",
    least=0.57,
  ),
  Bound(
    claim="MaxText trains a 70B model with 65% MFU on v5p-128: under the bound",
    cell="Llama-3.1-70B, full, v5p:4x4x4",
    field="mfu_bound",
    least=0.65,
  ),
)


def published() -> tuple[Cell, ...]:
  """Returns the cells: published shapes, and methods of this repository."""
  return CELLS


def claims() -> tuple[Bound, ...]:
  """Returns the articles' claims on memory, and published rates."""
  return BOUNDS
