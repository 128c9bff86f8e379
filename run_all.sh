#!/usr/bin/env bash
# The whole pipeline.
#   bash run_all.sh                 embedded demo: data, quality model, analysis, training with every
#                                   sampler, fine-tuning, evaluation, figures, user study. Minutes on
#                                   two CPU cores.
#   bash run_all.sh demo --all-rows with the fine-tuning variants of Table 7 as well
#   NET=rrdb SEED=1 bash run_all.sh the same for RealESRGAN's network, with another seed
#   bash run_all.sh seeds 1 2 3     the demo for several seeds, and one table over them
#   bash run_all.sh paper           the paper's settings (see `paper` below for the inputs); steps
#                                   that are complete are skipped
#   bash run_all.sh paper --dry-run              print the plan, with its commands, and stop
#   bash run_all.sh paper --only SwinIR-AMO+FT   one step of it, and what that starts from
#   bash run_all.sh python [FILE]   print a Python that has FILE's requirements, made if need be
set -euo pipefail
cd "$(dirname "$0")"
trap 'exit 130' INT TERM # the scripts end with 0 when they are stopped; no next step begins then

# --------------------------------------------------------------------------- set-up

python_with() { # FILE: the current Python if it has FILE's requirements, else .venv
  local check='
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
try:
    from packaging.requirements import Requirement
except ImportError:
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
    # pyiqa brings opencv-python, which needs libGL and lies in the same folder as the headless one
    "$current" -c "import cv2" 2>/dev/null || "$current" -m pip install -q --force-reinstall \
      --no-deps "$(grep -o '^opencv-python-headless[^ ]*' requirements.txt)" >&2 ||
      refuse "could not install opencv-python-headless into .venv"
  fi
  "$current" -c "import cv2" || refuse "OpenCV cannot be imported, see above; where libGL is missing:
    $current -m pip install --force-reinstall --no-deps opencv-python-headless"
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

# --------------------------------------------------------------------------- rows of the tables

# Rows of Tables 5 and 7, for each network.
# name | script | starts from | run by: both, all (paper, and demo --all-rows) or demo | flags
# @base: the run folder that it starts from; @other: another NR-IQA than Q; @naive: learning rate
rows="
OrigsOnly        | train_sr.py      | stage1 | both | --sampler origs_only
Rand             | train_sr.py      | stage1 | both | --sampler rand
UPos             | train_sr.py      | stage1 | both | --sampler upos
SMA              | train_sr.py      | stage1 | both | --sampler sma
SMP              | train_sr.py      | stage1 | both | --sampler smp
AMO              | train_sr.py      | stage1 | both | --sampler amo
UPos+FT          | finetune_lora.py | UPos   | both | --sampler upos
UPos+FT_HP       | finetune_lora.py | UPos   | all  | --sampler upos --lambda-p 2
UPos+FT_IG       | finetune_lora.py | UPos   | all  | --sampler upos --lambda-a 0.1 --init-d @base/last.pt
UPos+FT_NNR,IGx2 | finetune_lora.py | UPos   | all  | --sampler upos --lambda-a 0.2 --lambda-q 0 --init-d @base/last.pt
UPos+FT_NNR,IGx5 | finetune_lora.py | UPos   | all  | --sampler upos --lambda-a 0.5 --lambda-q 0 --init-d @base/last.pt
UPos+FT_PaQ2PiQ  | finetune_lora.py | UPos   | all  | --sampler upos --iqa @other
AMO+FT           | finetune_lora.py | AMO    | both | --sampler amo
AMO+FT_Q0        | finetune_lora.py | AMO    | demo | --sampler amo --lambda-q 0
AMO+FT_full      | finetune_lora.py | AMO    | both | --sampler amo --full @naive
"
row_names() { # SCRIPT KIND...: names of the rows of these kinds, SCRIPT may be any
  awk -F' *[|] *' -v s="$1" -v kinds=" ${*:2} " \
    'NF > 4 && (s == "any" || $2 == s) && index(kinds, " " $4 " ") { print $1 }' <<<"$rows"
}
row_field() { # NAME COLUMN
  awk -F' *[|] *' -v n="$1" -v c="$2" '$1 == n { print $c }' <<<"$rows"
}
row_flags() { # NAME BASE OTHER NAIVE: the flags, filled in
  local flags
  flags=$(row_field "$1" 5)
  flags=${flags//@base/$2} flags=${flags//@other/$3}
  echo "${flags//@naive/$4}"
}

# --------------------------------------------------------------------------- demo

demo_row() { # NAME: train one row; its output goes to a log, one line to the screen
  local name=$1 script init flags begin=$SECONDS
  script=$(row_field "$name" 2) init=$(row_field "$name" 3)
  flags=$(row_flags "$name" "$runs/$init" "$judge" "--lr 1e-4")
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

demo_rows() { # SAMPLER: its row, and the fine-tunings that start from it
  local name
  demo_row "$1"
  # shellcheck disable=SC2086
  for name in $(row_names finetune_lora.py $kinds); do
    if [ "$(row_field "$name" 3)" = "$1" ]; then
      demo_row "$name"
    fi
  done
}

side_by_side() { # COMMAND...: one per core at a time
  printf '%s\0' "$@" | xargs -0 -P "$jobs" -I{} bash -c "set -euo pipefail; trap 'exit 130' INT TERM; {}" ||
    exit 1
}

demo() { # [--all-rows]
  local begin=$SECONDS kinds="both demo"
  case "${*-}" in
    "") ;;
    --all-rows) kinds="both all demo" ;;
    *) refuse "demo $*: unknown flag; only --all-rows is known" ;;
  esac
  local tag=$net-seed$seed
  data=datasets/demo/$tag runs=runs/demo/$tag
  results=results/demo-$tag
  [ "$tag" = swinir-seed0 ] && results=results/demo
  jobs=$(getconf _NPROCESSORS_ONLN) && jobs=$((jobs > 4 ? 4 : jobs))
  q=demo.quality:q@$runs/q.pt judge=demo.quality:judge@$runs/judge.pt
  gt=$data/HGGT/Test/GT/Test-100
  lq=$data/HGGT/Test/Blind_Degradation_Benchmark_LQ/Test-100/Blind_LR
  # One thread per process: the same numbers on every machine, and two rows side by side.
  export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= PYTHON net seed data runs results rows kinds label
  export q judge train one two fine gt lq
  # glibc: keep what is freed; else a twentieth of the time goes into fetching zeroed pages again
  export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296
  export -f row_names row_field row_flags demo_row demo_rows demo_quality demo_stage_one
  export -f demo_analysis demo_table5 demo_table8 demo_figures demo_study demo_figure7 demo_curve

  train="--net ${net}_tiny --data $data/HGGT --iqa $q --patch-size 64 --seed $seed
    --perceptual laplacian --num-workers 0 --cache $runs/cache --log-every 10 --sample-every 50"
  one="--lambda-p 0 --lambda-a 0 --steps 400 --lr 1e-3 --milestones 200 300 360 --ema-decay 0.95"
  # The discriminator collapses at higher rates, on some rows only, which hides the samplers
  two="--steps 200 --lr 1e-3 --lr-d 2e-4 --lambda-a 0.03 --milestones 120 160 180
    --ema-decay 0.985 --tau 3"
  # lambda_q is in units of Q, 0 to 100, as the paper's 0.05 is in units of MUSIQ
  fine="--steps 60 --lr 2e-3 --lr-d 2e-4 --milestones 45 --ema-decay 0.9 --lora-rank 8 --lambda-q 0.001"

  echo "1/6 data: $data"
  [ -d "$data" ] || rm -rf "$runs" # of other data
  mkdir -p "$runs"
  "$PYTHON" -m demo.data --out "$data" --seed "$seed" --setting "$setting"
  echo "2/6 quality model Q, and stage one (L1)"
  side_by_side "demo_quality q" demo_stage_one
  echo "3/6 the samplers with their fine-tunings; the judge; analysis against the (simulated) raters"
  side_by_side "demo_quality judge; demo_analysis" "demo_rows AMO" \
    "demo_rows UPos" "demo_rows OrigsOnly" "demo_rows Rand" "demo_rows SMA" "demo_rows SMP"
  echo "4/6 evaluation"
  side_by_side demo_table5 "demo_table8; demo_curve"
  echo "5/6 figures, comparison with the paper, user study"
  side_by_side demo_figures demo_study
  echo "6/6 orderings, and the report: a page of all this"
  "$PYTHON" -m demo.report --results "$results"
  reference=results/reference/$tag.csv
  [ ! -f "$reference" ] || "$PYTHON" -m demo.report --logs "$runs" --reference "$reference"
  "$PYTHON" report.py --results "$results" --sr "$runs/sr" --gt "$gt" --lq "$lq"
  echo "done in $((SECONDS - begin)) s; results in $results"
}

demo_table5() {
  local name models=()
  # shellcheck disable=SC2086
  for name in $(row_names any $kinds); do
    models+=("$label-$name=$runs/$name/net_g_ema.pt")
  done
  "$PYTHON" evaluate.py --models "${models[@]}" --gt "$gt" --lq "$lq" --metrics psnr ssim \
    --extra "q=$q" "judge=$judge" --save-sr "$runs/sr" --out "$results/table5.csv"
}

demo_table8() {
  local name models=()
  for name in OrigsOnly UPos AMO AMO+FT; do
    models+=("$label-$name=$runs/$name/net_g_ema.pt")
  done
  "$PYTHON" evaluate.py --models "${models[@]}" --realsr "$data/RealSR(V3)" --metrics psnr ssim \
    --extra "q=$q" "judge=$judge" --out "$results/table8.csv"
}

demo_analysis() {
  "$PYTHON" analyze_iqa.py --pairs "$data/SBS180K/train.csv" --pairs-test "$data/SBS180K/test.csv" \
    --sets "$data/HGGT" --metrics "q=$q" "judge=$judge" piqe --reference q --out "$results"
}

demo_figures() {
  "$PYTHON" figures.py --results "$results" --sr "$runs/sr" --gt "$gt" --lq "$lq" --quality q \
    --held-out judge --reference "$data/pristine/test"
}

demo_curve() { # AMO+FT's adapters on AMO, from none to more than were trained
  local scale models=("0=$runs/AMO/net_g_ema.pt" "1=$runs/AMO+FT/net_g_ema.pt")
  for scale in 0.5 1.5; do
    "$PYTHON" evaluate.py --ckpt "$runs/AMO/net_g_ema.pt" --lora "$runs/AMO+FT/lora.pt" \
      --lora-scale "$scale" --export "$runs/lora-$scale.pt"
    models+=("$scale=$runs/lora-$scale.pt")
  done
  mapfile -t models < <(printf '%s\n' "${models[@]}" | sort -n)
  "$PYTHON" evaluate.py --models "${models[@]}" --gt "$gt" --lq "$lq" --metrics psnr ssim \
    --extra "q=$q" "judge=$judge" --out "$results/lora_curve.csv"
  "$PYTHON" -m demo.report --curve "$results/lora_curve.csv"
}

demo_study() { # twelve pages, and the votes of simulated raters to show their analysis
  rm -rf "$runs/study"
  "$PYTHON" user_study.py make --a "$label-AMO+FT=$runs/sr/$label-AMO+FT" \
    --b "$label-UPos=$runs/sr/$label-UPos" --pairs 4 --out "$runs/study"
  demo_figure7
  "$PYTHON" -m demo.report --study "$runs/study" --sr "$runs/sr" --out "$runs/study/votes" \
    --pristine "$data/pristine/test"
  "$PYTHON" user_study.py analyze "$runs"/study/votes/*.json --key "$runs/study/key.json" \
    --out "$results/user_study_simulated.csv"
}

demo_figure7() { # a picture of the user study's page, where a browser is installed
  local browser picture=$PWD/$results/figure7.png
  browser=$(command -v chromium chromium-browser google-chrome | head -n 1) || true
  if [ -n "$browser" ] && timeout 60 "$browser" --headless --no-sandbox --disable-gpu \
    --hide-scrollbars --disable-background-networking --user-data-dir="$PWD/$runs/browser" \
    --window-size=900,760 --screenshot="$picture" "file://$PWD/$runs/study/rater01.html" \
    >"$runs/browser.log" 2>&1; then
    echo "figure7.png: written"
  else
    echo "figure7.png: not made, no Chromium; it is a picture of $runs/study/rater01.html"
  fi
  rm -rf "$runs/browser"
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
# GPUS=4     processes on this node
# Steps: analysis; <Net>-stage1 and <Net>-<row> for Net SwinIR and RealESRGAN; table5 (and 7);
# table8; figures; study; report.
hggt=${HGGT:-datasets/HGGT} sbs=${SBS180K:-datasets/SBS180K} gpus=${GPUS:-4}
realsr=${REALSR:-datasets/RealSR(V3)} df2k=${DF2K_OST:-datasets/DF2K_OST}
test_gt=$hggt/Test/GT/Test-100
test_lq=$hggt/Test/Blind_Degradation_Benchmark_LQ/Test-100/Blind_LR

paper_steps() { # all of them, in order
  local net row
  echo analysis
  for net in SwinIR RealESRGAN; do
    echo $net-stage1
    row_names any both all | sed "s/^/$net-/"
  done
  printf '%s\n' table5 table8 figures study report
}

paper_chain() { # STEP: it and what it starts from as far as that is missing, first things first
  local from
  case $1 in
    *-stage1 | analysis | table5 | table8 | figures | study | report) ;;
    *)
      from=${1%%-*}-$(row_field "${1#*-}" 3)
      [ -f "runs/$from/net_g_ema.pt" ] || paper_chain "$from"
      ;;
  esac
  echo "$1"
}

paper_models() { # ROW...: "NAME=FILE" of the trained and planned rows among these, of both networks
  local net row
  for net in SwinIR RealESRGAN; do
    for row in "$@"; do
      if [ -f "runs/$net-$row/net_g_ema.pt" ] || grep -qxF -- "$net-$row" <<<"$plan"; then
        echo "$net-$row=runs/$net-$row/net_g_ema.pt"
      fi
    done
  done
}

paper_command() { # STEP: sets command, made (the file that marks it complete, if any) and hours
  local net=${1%%-*} row=${1#*-} launch flags init models=() with=()
  launch=("$PYTHON" -m torch.distributed.run --standalone "--nproc_per_node=$gpus")
  made= hours=
  case $net in
    SwinIR) init=${SWINIR_INIT-} with=(--net swinir) hours=23 ;;
    RealESRGAN) init=${RRDB_INIT-} with=(--net rrdb) hours=32 ;;
  esac
  case $1 in
    analysis)
      command=("${launch[@]}" analyze_iqa.py --pairs "$sbs/train.csv" --pairs-test "$sbs/test.csv"
        --sets "$hggt" --require-all --out results/paper)
      made=results/paper/figure2.csv
      ;;
    table5)
      # shellcheck disable=SC2046
      mapfile -t models < <(paper_models $(row_names any both all))
      [ ${#models[@]} -gt 0 ] || refuse "table5: no row is trained yet"
      command=("${launch[@]}" evaluate.py --models "${models[@]}" --gt "$test_gt" --lq "$test_lq"
        --require-all --save-sr results/paper/sr --out results/paper/table5.csv)
      ;;
    table8)
      mapfile -t models < <(paper_models OrigsOnly UPos AMO AMO+FT)
      [ ${#models[@]} -gt 0 ] || refuse "table8: no row of it is trained yet"
      command=("${launch[@]}" evaluate.py --models "${models[@]}" --realsr "$realsr" --require-all
        --out results/paper/table8.csv)
      ;;
    figures)
      command=("$PYTHON" figures.py --results results/paper --sr results/paper/sr
        --gt "$test_gt" --lq "$test_lq")
      ;;
    report) # eight rows' images of twenty test images: about 130 MB
      mapfile -t models < <(paper_models UPos AMO UPos+FT AMO+FT | sed 's/=.*//')
      command=("$PYTHON" report.py --results results/paper --sr results/paper/sr
        --gt "$test_gt" --lq "$test_lq" --images 20)
      [ ${#models[@]} = 0 ] || command+=(--models "${models[@]}")
      ;;
    study)
      command=("$PYTHON" user_study.py make --a SwinIR-AMO+FT=results/paper/sr/SwinIR-AMO+FT
        --b SwinIR-UPos=results/paper/sr/SwinIR-UPos --out results/paper/study)
      made=results/paper/study/key.json
      ;;
    *-stage1)
      command=("${launch[@]}" train_sr.py "${with[@]}" --data "$df2k" --lambda-p 0 --lambda-a 0
        --seed "$seed" --init "$init" --out "runs/$1")
      made=runs/$1/net_g_ema.pt
      ;;
    *)
      [ "$(row_field "$row" 2)" = finetune_lora.py ] && hours=3.5
      init=runs/$net-$(row_field "$row" 3)
      read -ra flags <<<"$(row_flags "$row" "$init" paq2piq "")"
      command=("${launch[@]}" "$(row_field "$row" 2)" "${with[@]}" --data "$hggt"
        --init "$init/net_g_ema.pt" --seed "$seed" --out "runs/$1" "${flags[@]}")
      made=runs/$1/net_g_ema.pt
      ;;
  esac
}

paper() { # [--dry-run] [--only STEP]...
  local dry=0 only=() step command made hours all total=0 todo=()
  while [ $# -gt 0 ]; do
    case $1 in
      --dry-run) dry=1 ;;
      --only) [ $# -gt 1 ] || refuse "--only: name a step"; only+=("$2"); shift ;;
      *) refuse "paper $1: unknown flag; --dry-run and --only STEP are known" ;;
    esac
    shift
  done
  [[ $gpus =~ ^[1-9][0-9]*$ ]] || refuse "GPUS=$gpus is not a number of GPUs"
  [ "$seed" = 0 ] || refuse "SEED=$seed: paper mode is seed 0, its folders name none; use the scripts' --seed"
  plan=$(paper_steps) all=$plan
  for step in "${only[@]}"; do
    grep -qxF -- "$step" <<<"$all" ||
      refuse "--only $step: no such step; one of $(tr '\n' ' ' <<<"$all")"
  done
  [ ${#only[@]} = 0 ] ||
    plan=$(for step in "${only[@]}"; do paper_chain "$step"; done) # in the order of all steps:
  plan=$(grep -xF -- "$plan" <<<"$all")

  echo "plan, hours on $gpus GPUs estimated from the paper's on four A100 (Sec. 8.2):"
  while read -r step; do
    paper_command "$step"
    if [ -n "$made" ] && [ -f "$made" ]; then
      printf '  %-28s complete: %s\n' "$step" "$made"
      continue
    fi
    todo+=("$step")
    if [ -n "$hours" ]; then
      hours=$(awk -v h="$hours" -v g="$gpus" 'BEGIN { printf "%.1f", h * 4 / g }')
      total=$(awk -v a="$total" -v b="$hours" 'BEGIN { printf "%.1f", a + b }')
    fi
    printf '  %-28s %6s h\n' "$step" "${hours:--}"
    [ $dry = 0 ] || printf '      %s\n' "$(printf '%q ' "${command[@]}")"
  done <<<"$plan"
  echo "  in all $total h of training"
  [ $dry = 0 ] || return 0
  [ ${#todo[@]} -gt 0 ] || { echo "nothing to do; delete a file named above to do it again"; return 0; }
  paper_check "${todo[@]}"
  for step in "${todo[@]}"; do
    paper_command "$step"
    echo "== $step"
    if ! "${command[@]}" </dev/null || { [ -n "$made" ] && [ ! -f "$made" ]; }; then
      echo "run_all.sh: $step did not end well; the same command goes on from there" >&2
      exit 1
    fi
  done
}

paper_check() { # STEP...: all that they need; nothing is started if anything is missing
  local wrong=0 steps found free need_gb=2 name
  steps=" $* "
  echo "checking data, weights, disk space and GPUs"
  need() { [ -e "$2" ] || { echo "run_all.sh: $2: not there; set $1=" >&2; wrong=1; }; }
  if [[ $steps == *" analysis "* ]]; then
    need SBS180K "$sbs/train.csv"
    need SBS180K "$sbs/test.csv"
  fi
  need HGGT "$hggt/Train/images"
  need HGGT "$test_gt/images"
  need HGGT "$test_lq"
  [[ $steps != *" table8 "* ]] || need REALSR "$realsr"
  [[ $steps != *-stage1* ]] || need DF2K_OST "$df2k"
  [[ $steps != *" SwinIR-stage1 "* ]] || need SWINIR_INIT "${SWINIR_INIT:-no SWINIR_INIT given}"
  [[ $steps != *" RealESRGAN-stage1 "* ]] || need RRDB_INIT "${RRDB_INIT:-no RRDB_INIT given}"
  if [[ $steps == *-* || $steps == *" analysis "* || $steps == *" table"* ]]; then
    found=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
    [ "$found" -ge "$gpus" ] ||
      { echo "run_all.sh: $found GPUs found, GPUS=$gpus asked for" >&2; wrong=1; }
    [ $((32 % gpus + 48 % gpus)) = 0 ] ||
      { echo "run_all.sh: GPUS=$gpus must divide the batch sizes 32 and 48" >&2; wrong=1; }
  fi
  # A run folder holds weights, averages, two optimisers and, while it saves, all of them twice
  for name in "$@"; do [[ $name != *-* ]] || need_gb=$((need_gb + 1)); done
  free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
  [ "$free" -ge "$need_gb" ] ||
    { echo "run_all.sh: $free GB free on this disk; about $need_gb GB are needed" >&2; wrong=1; }
  [ "$wrong" = 0 ] || exit 2
  STEPS=$steps "$PYTHON" - "$hggt" "$test_gt" "$test_lq" "$realsr" "$df2k" <<'PY' || exit 2
import os
import sys
from evaluate import check_pairs, find_realsr
from models.hggt import load_sets
from models.losses import VGG19Loss
from train_sr import load_checked, parse_args
hggt, gt, lq, realsr, df2k = sys.argv[1:]
steps = os.environ["STEPS"].split()
try:
    print(len(load_sets(hggt).names), "training sets")
    test = load_sets(gt)
    problems = check_pairs(test, [f"{lq}/{name}.png" for name in test.names], False)
    if "table8" in steps:
        problems += check_pairs(*find_realsr(realsr), True)
    if problems:
        raise ValueError(problems[0])
    for step, net in ("SwinIR-stage1", "swinir"), ("RealESRGAN-stage1", "rrdb"):
        if step in steps:
            print(len(load_sets(df2k).names), "images for stage one")
            load_checked(parse_args(["--net", net, "--init", os.environ[f"{net.upper()}_INIT"]]))
    if any("-" in step for step in steps):
        VGG19Loss()
except (ValueError, OSError) as error:
    print(f"run_all.sh: {error}", file=sys.stderr)
    sys.exit(1)
PY
  local metrics=(musiq)
  [[ $steps != *PaQ2PiQ* ]] || metrics+=(paq2piq)
  [[ $steps != *" table"* ]] || metrics+=(lpips stlpips dists nima qalign topiq_nr)
  # shellcheck disable=SC2207
  [[ $steps != *" analysis "* ]] ||
    metrics+=($("$PYTHON" -c 'import analyze_iqa; print(*analyze_iqa.METRICS)'))
  "$PYTHON" -m models.iqa prefetch "${metrics[@]}" || exit 2
}

# --------------------------------------------------------------------------- main

case ${1:-demo} in
  demo) demo "${@:2}" ;;
  seeds) seeds "${@:2}" ;;
  paper) paper "${@:2}" ;;
esac
