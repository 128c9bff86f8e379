"""Download all metric weights into one folder, or into the cache folders.

    python -m tools.prefetch                          # for training, Tables 5, 7, 8: 18 GB
    python -m tools.prefetch musiq nima --into DIR    # two metrics, into one folder
    python -m tools.prefetch $(python -c "import analyze_iqa; print(*analyze_iqa.METRICS)")
                                                      # Tables 1-4 and 6: 42 metrics

Files that are there already are checked. If anything is there, the last line printed sets the
variables for runs without a network.
"""

import argparse
import os

from models.checkpoint import one_line
from models.distributed import clean_exit
from models.flags import new_parser
from models.iqa import PAPER_FILES, PREFETCH, cache_folders
from models.weights import prefetch

PAPER_NAMES = (*PAPER_FILES["NR"], *PAPER_FILES["FR"], "vgg19")
ADVICE = f"; on a machine with a network, run: {PREFETCH}"  # in messages: to run this very command


def reason(error: Exception) -> str:
    """Why a name could not be fetched, on one line."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):  # Q-Align's; its own words fill three lines
        return "cannot be downloaded: no connection, or HF_HUB_OFFLINE is set"
    return one_line(error, 1000).partition(ADVICE)[0]


def main(args: argparse.Namespace) -> None:
    if args.into:  # huggingface_hub and pyiqa read these when they are imported, by prefetch
        os.environ.pop("HF_HUB_CACHE", None)
        os.environ["TORCH_HOME"] = os.path.abspath(os.path.join(args.into, "torch"))
        os.environ["HF_HOME"] = os.path.abspath(os.path.join(args.into, "huggingface"))
    names, problems = args.names or PAPER_NAMES, []
    for name in names:
        try:
            prefetch(name)
            print(f"{name}: ready", flush=True)
        except (ValueError, OSError, ImportError) as error:  # go on with the other names
            problems.append(f"{name}: {reason(error)}")
    if len(problems) < len(names):
        hub, hugging_face = cache_folders()
        print(f"For runs without a network: export TORCH_HOME={hub.parent} "
              f"HF_HOME={hugging_face.parent} HF_HUB_OFFLINE=1")
    if problems:
        raise ValueError("\n".join(problems))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser("Download the weights of metrics.", "python -m tools.prefetch")
    parser.add_argument("names", nargs="*", metavar="NAME", help="pyiqa metrics; vgg19 is the "
                        "perceptual loss's (default, for training and Tables 5, 7, 8: "
                        + " ".join(PAPER_NAMES) + ")")
    parser.add_argument("--into", metavar="DIR", help="folder for all files (default: the caches)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("prefetch.py"):
        main(parse_args())
