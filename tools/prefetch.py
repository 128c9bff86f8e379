"""Download all metric weights into one folder, or into the cache folders.

    python -m tools.prefetch                          # all that the paper's runs need: 18 GB
    python -m tools.prefetch musiq nima --into DIR    # two metrics, into one folder

Files that are there already are checked. The last line printed sets the variables for runs without
a network.
"""

import argparse
import os

from models.checkpoint import one_line
from models.distributed import clean_exit
from models.iqa import PAPER_FILES, cache_folders
from models.weights import prefetch

PAPER_NAMES = (*PAPER_FILES["NR"], *PAPER_FILES["FR"], "vgg19")


def main(args: argparse.Namespace) -> None:
    if args.into:  # huggingface_hub and pyiqa read these when they are imported, by prefetch
        os.environ.pop("HF_HUB_CACHE", None)
        os.environ["TORCH_HOME"] = os.path.abspath(os.path.join(args.into, "torch"))
        os.environ["HF_HOME"] = os.path.abspath(os.path.join(args.into, "huggingface"))
    problems = []
    for name in args.names or PAPER_NAMES:
        try:
            prefetch(name)
            print(f"{name}: ready", flush=True)
        except (ValueError, OSError, ImportError) as error:  # go on with the other names
            problems.append(f"{name}: {one_line(error, 1000)}")
    hub, hugging_face = cache_folders()
    print(f"For runs without a network: export TORCH_HOME={hub.parent} "
          f"HF_HOME={hugging_face.parent} HF_HUB_OFFLINE=1")
    if problems:
        raise ValueError("\n".join(problems))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tools.prefetch", allow_abbrev=False,
                                     description="Download the weights of metrics.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="pyiqa metrics; vgg19 is the "
                        "perceptual loss's (default: the paper's, " + " ".join(PAPER_NAMES) + ")")
    parser.add_argument("--into", metavar="DIR", help="folder for all files (default: the caches)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with clean_exit("prefetch.py"):
        main(parse_args())
