#!/usr/bin/env bash
# The whole pipeline.
#   bash run_all.sh                 embedded demo: data, quality model, analysis, training with every
#                                   sampler, fine-tuning, evaluation. Minutes on two CPU cores.
#   NET=rrdb SEED=1 bash run_all.sh the same for RealESRGAN's network, with another seed
#   bash run_all.sh seeds 1 2 3     the demo for several seeds, and one table over them
#   bash run_all.sh paper           the paper's settings (see `paper` below for the inputs)
#   bash run_all.sh python [FILE]   print a Python that has FILE's requirements, made if need be
set -euo pipefail
cd "$(dirname "$0")"

# --------------------------------------------------------------------------- set-up

python_with() { # FILE: the current Python if it has FILE's requirements, else .venv
  local check='
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pip._vendor.packaging.requirements import Requirement
def missing(path):
    for line in Path(path).read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r"):
            yield from missing(Path(path).parent / line[2:].strip())
        elif line:
            need = Requirement(line)
            try:
                ok = need.specifier.contains(version(need.name), prereleases=True)
            except PackageNotFoundError:
                ok = False
            if not ok:
                yield line
sys.exit(any(missing(sys.argv[1])) or sys.version_info < (3, 10))'
  local current
  current=$(command -v python3 || command -v python) || refuse "no Python"
  if ! "$current" -c "$check" "$1" 2>/dev/null; then
    if [ ! -x .venv/bin/python ]; then
      "$current" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        refuse "$current is too old; Python 3.10 or newer is needed"
      echo "making .venv (once)" >&2
      "$current" -m venv .venv || refuse "could not make .venv"
    fi
    current=$PWD/.venv/bin/python
    if ! "$current" -c "$check" "$1" 2>/dev/null; then
      echo "installing $1 into .venv (once; several GB with PyTorch's CUDA libraries)" >&2
      "$current" -m pip install -q -r "$1" >&2 || refuse "could not install $1 into .venv"
    fi
  fi
  echo "$current"
}

refuse() { # MESSAGE
  echo "run_all.sh: $1" >&2
  exit 2
}

net=${NET:-swinir} seed=${SEED:-0}
case ${1:-demo} in
  demo | seeds | paper | python) ;;
  *) refuse "unknown command $1; see the head of this file" ;;
esac
case $net in
  swinir) label=SwinIR setting=light ;;
  rrdb) label=RealESRGAN setting=two_round ;;
  *) refuse "NET=$net; use swinir or rrdb" ;;
esac
[[ $seed =~ ^[0-9]+$ ]] || refuse "SEED=$seed is not a number"
if [ "${1-}" = python ]; then
  python_with "${2:-requirements.txt}" || exit 2
  exit
fi
PYTHON=$(python_with requirements.txt) || exit 2

# --------------------------------------------------------------------------- rows of Table 5

# name | script | row or stage that it starts from | flags
rows="
OrigsOnly | train_sr.py      | stage1 | --sampler origs_only
Rand      | train_sr.py      | stage1 | --sampler rand
UPos      | train_sr.py      | stage1 | --sampler upos
SMA       | train_sr.py      | stage1 | --sampler sma
SMP       | train_sr.py      | stage1 | --sampler smp
AMO       | train_sr.py      | stage1 | --sampler amo
UPos+FT   | finetune_lora.py | UPos   | --sampler upos
AMO+FT    | finetune_lora.py | AMO    | --sampler amo
AMO+FT_Q0 | finetune_lora.py | AMO    | --sampler amo --lambda-q 0
AMO+FT_full | finetune_lora.py | AMO  | --sampler amo --full --lr 2e-4
"
row_names() { # SCRIPT
  awk -F' *[|] *' -v s="$1" '$2 == s { print $1 }' <<<"$rows"
}
row_field() { # NAME COLUMN
  awk -F' *[|] *' -v n="$1" -v c="$2" '$1 == n { print $c }' <<<"$rows"
}

# --------------------------------------------------------------------------- demo

demo_row() { # NAME: train one row; its output goes to a log, one line to the screen
  local name=$1 script init flags begin=$SECONDS
  script=$(row_field "$name" 2) init=$(row_field "$name" 3) flags=$(row_field "$name" 4)
  case $script in
    train_sr.py) flags="$train $two $flags" ;;
    *) flags="$train $fine $flags" ;;
  esac
  # shellcheck disable=SC2086
  if ! "$PYTHON" "$script" $flags --init "$runs/$init/net_g_ema.pt" --out "$runs/$name" \
    >"$runs/$name.log" 2>&1; then
    tail -n 5 "$runs/$name.log" >&2
    echo "run_all.sh: $label-$name failed; see $runs/$name.log" >&2
    return 1
  fi
  printf '  %-24s %3d s\n' "$label-$name" $((SECONDS - begin))
}

side_by_side() { # FUNCTION NAME...: run FUNCTION for every name, one process per core at a time
  local function=$1
  shift
  printf '%s\0' "$@" | xargs -0 -P "$jobs" -I{} bash -c "set -euo pipefail; $function {}" ||
    exit 1
}

demo() {
  local begin=$SECONDS
  local tag=$net-seed$seed
  data=datasets/demo/$tag runs=runs/demo/$tag
  results=results/demo-$tag
  [ "$tag" = swinir-seed0 ] && results=results/demo
  jobs=$(getconf _NPROCESSORS_ONLN) && jobs=$((jobs > 4 ? 4 : jobs))
  q=demo.quality:q@$runs/q.pt judge=demo.quality:judge@$runs/judge.pt
  # One thread per process: the same numbers on every machine, and two rows side by side.
  export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= PYTHON label runs rows train two fine
  export -f row_field demo_row

  train="--net ${net}_tiny --data $data/HGGT --iqa $q --patch-size 64 --seed $seed
    --perceptual laplacian --num-workers 0 --log-every 10 --sample-every 50"
  one="--lambda-p 0 --lambda-a 0 --steps 400 --lr 1e-3 --milestones 200 300 360 --ema-decay 0.95"
  two="--steps 200 --lr 1e-3 --lr-d 4e-4 --milestones 120 160 180 --ema-decay 0.98"
  # lambda_q is in units of Q, 0 to 100, as the paper's 0.05 is in units of MUSIQ
  fine="--steps 60 --lr 2e-3 --milestones 45 --ema-decay 0.9 --lora-rank 8 --lambda-q 0.001"

  mkdir -p "$runs"
  echo "1/6 data: $data"
  [ -f "$data/SBS180K/test.csv" ] ||
    "$PYTHON" -m demo.data --out "$data" --seed "$seed" --setting "$setting"
  echo "2/6 quality model Q, judge, and stage one (L1), side by side"
  demo_stage_one &
  stage_one=$!
  trap 'pkill -P $stage_one 2>/dev/null; kill $stage_one 2>/dev/null' EXIT
  demo_quality q
  demo_quality judge
  wait $stage_one
  trap - EXIT
  echo "3/6 analysis of the quality models against the (simulated) raters"
  "$PYTHON" analyze_iqa.py --pairs "$data/SBS180K/train.csv" --pairs-test "$data/SBS180K/test.csv" \
    --sets "$data/HGGT" --metrics "q=$q" "judge=$judge" piqe --reference q --out "$results"
  echo "4/6 six samplers, then fine-tuning"
  mapfile -t samplers < <(row_names train_sr.py)
  mapfile -t finetunes < <(row_names finetune_lora.py)
  side_by_side demo_row "${samplers[@]}"
  side_by_side demo_row "${finetunes[@]}"
  echo "5/6 evaluation"
  local models=()
  for name in "${samplers[@]}" "${finetunes[@]}"; do
    models+=("$label-$name=$runs/$name/net_g_ema.pt")
  done
  "$PYTHON" evaluate.py --models "${models[@]}" --gt "$data/HGGT/Test/GT/Test-100" \
    --lq "$data/HGGT/Test/Blind_Degradation_Benchmark_LQ/Test-100/Blind_LR" \
    --metrics psnr ssim --extra "q=$q" "judge=$judge" --save-sr "$runs/sr" \
    --out "$results/table5.csv"
  echo "6/6 figures and orderings"
  "$PYTHON" -m demo.report --results "$results" --sr "$runs/sr" --data "$data"
  echo "done in $((SECONDS - begin)) s; results in $results"
}

demo_quality() { # q|judge
  [ -f "$runs/$1.pt" ] ||
    "$PYTHON" -m demo.quality --data "$data" --which "$1" --out "$runs/$1.pt" --seed "$seed"
}

demo_stage_one() { # on a flat folder: the originals
  local begin=$SECONDS
  "$PYTHON" -m demo.nets --net "${net}_tiny" --seed "$seed" --out "$runs/start.pt"
  # shellcheck disable=SC2086
  if ! "$PYTHON" train_sr.py $train $one --data "$data/HGGT/Train/images/0-40/original" \
    --init "$runs/start.pt" --out "$runs/stage1" >"$runs/stage1.log" 2>&1; then
    tail -n 5 "$runs/stage1.log" >&2
    echo "run_all.sh: stage one failed; see $runs/stage1.log" >&2
    return 1
  fi
  printf '  %-24s %3d s\n' "stage one" $((SECONDS - begin))
}

seeds() { # SEED...: the demo for each, then how often each ordering held
  local folders=() one_seed
  [ $# -gt 0 ] || refuse "usage: bash run_all.sh seeds 1 2 3"
  for one_seed in "$@"; do
    echo "== seed $one_seed"
    SEED=$one_seed bash run_all.sh
    folders+=("results/demo-$net-seed$one_seed")
    [ "$net-$one_seed" = swinir-0 ] && folders[-1]=results/demo
  done
  "$PYTHON" -m demo.report --seeds "${folders[@]}" --out "results/demo/seeds_$net.csv"
}

# --------------------------------------------------------------------------- paper

# HGGT=      folder with Train/ and Test/ (HGGT)           default datasets/HGGT
# SBS180K=   folder with train.csv and test.csv            default datasets/SBS180K
# REALSR=    RealSR(V3)                                    default datasets/RealSR(V3)
# DF2K_OST=  flat folder of 512x512 crops, for stage one   default datasets/DF2K_OST
# SWINIR_INIT=, RRDB_INIT=  PSNR-pretrained x4 weights to start stage one from (SwinIR-M, ESRGAN)
# GPUS=4     processes per node
paper() {
  local hggt=${HGGT:-datasets/HGGT} sbs=${SBS180K:-datasets/SBS180K}
  local realsr=${REALSR:-datasets/RealSR(V3)} df2k=${DF2K_OST:-datasets/DF2K_OST}
  local gpus=${GPUS:-4} wrong=0 name init script flags
  local lq=Test/Blind_Degradation_Benchmark_LQ/Test-100/Blind_LR

  echo "checking inputs and weights"
  need() { [ -e "$2" ] || { echo "run_all.sh: $2: not there; set $1=" >&2; wrong=1; }; }
  need HGGT "$hggt/Train/images"
  need HGGT "$hggt/Test/GT/Test-100/images"
  need HGGT "$hggt/$lq"
  need SBS180K "$sbs/train.csv"
  need SBS180K "$sbs/test.csv"
  need REALSR "$realsr"
  need DF2K_OST "$df2k"
  need SWINIR_INIT "${SWINIR_INIT:-no SWINIR_INIT given}"
  need RRDB_INIT "${RRDB_INIT:-no RRDB_INIT given}"
  local found
  found=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
  [ "$found" -ge "$gpus" ] ||
    { echo "run_all.sh: $found GPUs found, GPUS=$gpus asked for" >&2; wrong=1; }
  [ $((32 % gpus + 48 % gpus)) = 0 ] ||
    { echo "run_all.sh: GPUS=$gpus must divide the batch sizes 32 and 48" >&2; wrong=1; }
  [ "$wrong" = 0 ] || exit 2
  "$PYTHON" - "$hggt" "$hggt/$lq" "$realsr" "$df2k" "$SWINIR_INIT" "$RRDB_INIT" <<'PY' || exit 2
import sys
from evaluate import check_pairs, find_realsr
from models.hggt import load_sets
from models.losses import VGG19Loss
from train_sr import load_checked, parse_args
hggt, lq, realsr, df2k, *inits = sys.argv[1:]
try:
    print(len(load_sets(hggt).names), "training sets,", len(load_sets(df2k).names), "for stage one")
    test = load_sets(f"{hggt}/Test/GT/Test-100")
    problems = check_pairs(test, [f"{lq}/{name}.png" for name in test.names], False)
    problems += check_pairs(*find_realsr(realsr), True)
    if problems:
        raise ValueError(problems[0])
    for net, init in zip(("swinir", "rrdb"), inits):
        load_checked(parse_args(["--net", net, "--init", init]))
    VGG19Loss()
except (ValueError, OSError) as error:
    print(f"run_all.sh: {error}", file=sys.stderr)
    sys.exit(1)
PY
  # shellcheck disable=SC2046
  "$PYTHON" -m models.iqa prefetch lpips stlpips dists \
    $("$PYTHON" -c 'import analyze_iqa; print(*analyze_iqa.METRICS)') || exit 2

  local launch=("$PYTHON" -m torch.distributed.run --standalone "--nproc_per_node=$gpus")
  echo "training both networks; 23 h and 32 h on four A100 in the paper, per sampler"
  "${launch[@]}" analyze_iqa.py --pairs "$sbs/train.csv" --pairs-test "$sbs/test.csv" \
    --sets "$hggt" --out results/paper
  local models=()
  for net in swinir rrdb; do
    label=SwinIR init=${SWINIR_INIT-}
    [ $net = rrdb ] && label=RealESRGAN init=${RRDB_INIT-}
    "${launch[@]}" train_sr.py --net $net --data "$df2k" --lambda-p 0 --lambda-a 0 \
      --seed "$seed" --init "$init" --out "runs/$label-stage1"
    while IFS='|' read -r name script init flags; do
      name=${name// /} script=${script// /} init=${init// /}
      case $name in "" | *_Q0 | *_full) continue ;; esac # rows of the demo alone
      # shellcheck disable=SC2086
      "${launch[@]}" "$script" --net $net --data "$hggt" --init "runs/$label-$init/net_g_ema.pt" \
        --seed "$seed" --out "runs/$label-$name" $flags </dev/null
      models+=("$label-$name=runs/$label-$name/net_g_ema.pt")
    done <<<"$rows"
  done
  "$PYTHON" evaluate.py --models "${models[@]}" --gt "$hggt/Test/GT/Test-100" --lq "$hggt/$lq" \
    --require-all --save-sr results/paper/sr --out results/paper/table5.csv
  "$PYTHON" evaluate.py --models "${models[@]}" --realsr "$realsr" --require-all \
    --out results/paper/table8.csv
}

# --------------------------------------------------------------------------- main

case ${1:-demo} in
  demo) demo ;;
  seeds) seeds "${@:2}" ;;
  paper) paper ;;
esac
