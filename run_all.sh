#!/usr/bin/env bash
# The paper, from data to tables, as a list of commands. Rerun this script after an interruption:
# finished rows are skipped, the others resume.
#
#   bash run_all.sh                              the demo: minutes on two CPU cores
#   bash run_all.sh demo --net rrdb --seeds 1 2  the demo with other settings (demo/run.py)
#   bash run_all.sh photos [DIR]                 tune RealESRGAN on photos (tools/tune.py): yours,
#       or demo/photos; Q=demo.photo_quality:q PERCEPTUAL=laplacian where MUSIQ and VGG19 are absent
#   bash run_all.sh paper                        the paper: 1,764 GPU hours of training (A100)
#   DRY=1 bash run_all.sh paper                  print the commands, to copy, and stop
#   ONLY='SwinIR-AMO*' bash run_all.sh paper     only the steps that match a shell pattern: rows,
#       analysis, table5, table8, study, figures, report; several: ONLY='@(table5|figures)'
#   SEED=1 bash run_all.sh paper                 another seed, in runs/seed1 and results/paper-seed1
#
# The hours follow from the paper's (Sec. 8.2): on four A100, a training takes 23 h (SwinIR) or 32 h
# (RealESRGAN), a fine-tuning 3.5 h. Each network has 7 trainings, stage one counted like the six
# samplers, and 8 fine-tunings: 7 x 23 + 7 x 32 + 16 x 3.5 = 441 h on four GPUs.
set -euo pipefail
cd "$(dirname "$0")"
trap 'exit 130' INT TERM # no further step: a script that is stopped by a signal exits with 0

refuse() { echo "run_all.sh: $1" >&2; exit 2; }
if [[ ${1-} == -h || ${1-} == --help ]]; then
  sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0"
  exit
fi
if [ "${1-demo}" != paper ]; then
  [ "${1-demo}" = demo ] && script=demo.run || script=tools.tune
  for name in NET SEED DRY ONLY; do
    [ -z "${!name-}" ] || refuse "$name= is for the paper; see: python -m $script --help"
  done
fi
if [ -z "${DRY-}" ]; then # a Python with the requirements: the current one, or .venv's
  PYTHON=$(command -v python3 || command -v python) || refuse "no Python"
  PYTHON=$("$PYTHON" tools/environment.py demo/requirements.txt)
fi
python() { "$PYTHON" "$@"; }
torchrun() { "$PYTHON" -m torch.distributed.run "$@"; }
case ${1:-demo} in
  demo) exec "$PYTHON" -m demo.run "${@:2}" ;;
  photos)
    shift
    if [[ $OLDPWD != "$PWD" && ${1-} == [!/]* && -d $OLDPWD/$1 ]]; then # DIR as typed elsewhere
      set -- "$OLDPWD/$1" "${@:2}"
    fi
    exec "$PYTHON" -m tools.tune "$@" ;;
  paper) [ $# = 1 ] || refuse "paper $2: unknown; set variables, see the head of this file" ;;
  *) refuse "unknown command $1; see the head of this file" ;;
esac

# Inputs. The two weight files are PSNR-pretrained x4 networks, from which stage one starts.
hggt=${HGGT:-datasets/HGGT} sbs=${SBS180K:-datasets/SBS180K} realsr=${REALSR:-datasets/RealSR(V3)}
df2k=${DF2K_OST:-datasets/DF2K_OST} # a flat folder of 512x512 crops
swinir=${SWINIR_INIT:-weights/swinir_psnr.pth} rrdb=${RRDB_INIT:-weights/esrgan_psnr.pth}
gpus=${GPUS:-4} seed=${SEED:-0} only=${ONLY:-*}
[[ $gpus =~ ^[1-9][0-9]*$ ]] || refuse "GPUS=$gpus: not a number of GPUs"
[[ $seed =~ ^[0-9]+$ ]] || refuse "SEED=$seed: not a number"
runs=runs results=results/paper
[ "$seed" = 0 ] || runs=runs/seed$seed results=results/paper-seed$seed
test_gt=$hggt/Test/GT/Test-100
test_lq=$hggt/Test/Blind_Degradation_Benchmark_LQ/Test-100/Blind_LR
launch=(torchrun --standalone "--nproc_per_node=$gpus")
planned=" " matched= models=() table8=() equal=() shown=()

step() { # NAME FILE COMMAND...: run the command that makes FILE, unless it is there (-: always)
  [[ $1 == $only ]] || return 0 # $only is a pattern, hence unquoted
  matched=1
  if [ -e "$2" ]; then echo "# $1 is finished: $2"; return; fi
  printf '# %s\n' "$1"; printf '%q ' "${@:3}"; echo
  [ -z "${DRY-}" ] || return 0
  if ! "${@:3}" || [[ $2 != - && ! -e $2 ]]; then
    echo "run_all.sh: $1 did not finish; rerun the same command to resume" >&2
    exit 1
  fi
}
row() { # NAME SCRIPT FLAGS...: train $runs/NAME with the network $net
  local out=$runs/$1 flag
  if [[ $1 == $only && ! -e $out/net_g_ema.pt ]]; then
    for flag in "${@:3}"; do # what the row starts from must be there, or come first
      [[ $flag != "$runs"/* || -e $flag || $planned == *" ${flag%/*} "* ]] ||
        refuse "$1 starts from $flag, which is not there; first run ONLY=$(basename "${flag%/*}")"
    done
    planned+="$out "
  fi
  step "$1" "$out/net_g_ema.pt" "${launch[@]}" "$2" --net "$net" "${@:3}" --seed "$seed" \
    --out "$out"
  [[ $1 != *-stage1 && ( -e $out/net_g_ema.pt || $planned == *" $out "* ) ]] || return 0
  models+=("$1=$out/net_g_ema.pt")
  [[ ! $1 =~ -(OrigsOnly|UPos|AMO|AMO[+]FT)$ ]] || table8+=("$1=$out/net_g_ema.pt")
  [[ ! $1 =~ -(UPos|AMO)([+]FT)?$ ]] || shown+=("$1")
}

# Check data, weights, disk and GPUs for all selected commands, before the first one starts
if [ -z "${DRY-}" ]; then
  plan=$(DRY=1 bash run_all.sh paper)
  python -m tools.check --plan <<<"$plan" || refuse "nothing was started; HGGT=, SBS180K=, REALSR=,\
 DF2K_OST=, SWINIR_INIT=, RRDB_INIT= set the paths, GPUS= the number of GPUs, ONLY= the steps"
fi

# Tables 1-4 and 6
step analysis $results/figure2.csv "${launch[@]}" analyze_iqa.py --pairs "$sbs/train.csv" \
  --pairs-test "$sbs/test.csv" --sets "$hggt" --require-all --seed "$seed" --out $results

for name in SwinIR RealESRGAN; do
  if [ $name = SwinIR ]; then net=swinir init=$swinir; else net=rrdb init=$rrdb; fi
  row $name-stage1 train_sr.py --data "$df2k" --lambda-p 0 --lambda-a 0 --init "$init"

  # Table 5: the samplers
  from=(train_sr.py --data "$hggt" --init $runs/$name-stage1/net_g_ema.pt)
  row $name-OrigsOnly "${from[@]}" --sampler origs_only
  row $name-Rand      "${from[@]}" --sampler rand
  row $name-UPos      "${from[@]}" --sampler upos
  row $name-SMA       "${from[@]}" --sampler sma
  row $name-SMP       "${from[@]}" --sampler smp
  row $name-AMO       "${from[@]}" --sampler amo

  # Tables 5 and 7: fine-tuning
  upos=(finetune_lora.py --data "$hggt" --init $runs/$name-UPos/net_g_ema.pt --sampler upos)
  amo=(finetune_lora.py --data "$hggt" --init $runs/$name-AMO/net_g_ema.pt --sampler amo)
  gan=(--init-d $runs/$name-UPos/last.pt)
  row $name-UPos+FT          "${upos[@]}"
  row $name-UPos+FT_HP       "${upos[@]}" --lambda-p 2
  row $name-UPos+FT_IG       "${upos[@]}" "${gan[@]}" --lambda-a 0.1
  row $name-UPos+FT_NNR,IGx2 "${upos[@]}" "${gan[@]}" --lambda-a 0.2 --lambda-q 0
  row $name-UPos+FT_NNR,IGx5 "${upos[@]}" "${gan[@]}" --lambda-a 0.5 --lambda-q 0
  row $name-UPos+FT_PaQ2PiQ  "${upos[@]}" --iqa paq2piq
  row $name-AMO+FT           "${amo[@]}"
  row $name-AMO+FT_full      "${amo[@]}" --full

  # Figures 3 and 5: the change of AMO+FT_full, scaled to the quality of AMO+FT
  scaled=$runs/$name-AMO+FT_full_eq.pt
  step $name-AMO+FT_full_eq "$scaled" python -m paper.equal --base $runs/$name-AMO/net_g_ema.pt \
    --naive $runs/$name-AMO+FT_full/net_g_ema.pt --lora $runs/$name-AMO+FT/net_g_ema.pt \
    --lq "$test_lq" --out "$scaled"
  [[ ! -e $scaled && $name-AMO+FT_full_eq != $only ]] || equal+=("$name-AMO+FT_full_eq=$scaled")
done

# Tables 5 and 8 of the trained rows; user study; figures and Table 7; report
[[ table5 != $only || ${#models[@]} -gt 0 ]] || refuse "table5: no row is trained yet"
[[ table8 != $only || ${#table8[@]} -gt 0 ]] || refuse "table8: no row of it is trained yet"
step table5 - "${launch[@]}" evaluate.py --models "${models[@]}" --gt "$test_gt" --lq "$test_lq" \
  --require-all --save-sr $results/sr --out $results/table5.csv
step table8 - "${launch[@]}" evaluate.py --models "${table8[@]}" --realsr "$realsr" --require-all \
  --out $results/table8.csv
[[ equal != $only || ${#equal[@]} -gt 0 ]] || refuse "equal: no network is scaled yet"
step equal - "${launch[@]}" evaluate.py --models "${equal[@]}" --gt "$test_gt" --lq "$test_lq" \
  --require-all --save-sr $results/sr --out $results/equal.csv
step study $results/study/key.json python -m paper.user_study make --seed "$seed" \
  --a SwinIR-AMO+FT=$results/sr/SwinIR-AMO+FT --b SwinIR-UPos=$results/sr/SwinIR-UPos \
  --out $results/study
step figures - python -m paper.figures --results $results --sr $results/sr --gt "$test_gt" \
  --lq "$test_lq"
step report - python -m paper.report --results $results --sr $results/sr --runs $runs/ \
  --gt "$test_gt" --lq "$test_lq" --images 20 ${shown[@]:+--models "${shown[@]}"} # about 130 MB
[ -n "$matched" ] || refuse "ONLY=$only matches no step; see the head of this file"
