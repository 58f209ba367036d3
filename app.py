"""A web page that captions two images: python app.py, then open the URL that it prints."""

import argparse
import importlib.util
import os
import re
import sys

import system  # noqa: F401  (it checks first that Python is new enough)
from modules.web.hosts import host_name, own_hosts, plain_names
from system.command import run_command
from system.escaping import shorten, show
from system.flags import bounded, device_name
from system.parser import OneLineParser, find_program_name
from system.requirements import advise_extra
from system.urls import Location

SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?) *([kmgt]?)b?")
SIZE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}

PROXY_VARIABLES = ("all_proxy", "http_proxy", "https_proxy")
MAX_UPLOAD_AGE = 10**9  # seconds
MAX_UPLOAD_SPACE = 10**18  # bytes


def serve(args: argparse.Namespace) -> None:
    """Load the model and serve until stopped."""
    _set_up_gradio()
    from modules.predictor import Predictor
    from modules.web.image_decoding import MAX_MEGABYTES, start_fork_server
    from modules.web.server import (
        build_application,
        open_socket,
        run_server,
        stop_on_signals,
        url_of,
    )
    from modules.web.uploads import open_upload_folder
    from system.compute import keep_freed_memory
    from system.logs import showing_log_lines

    hosts = own_hosts(args.host)
    proxy_hosts = plain_names(args.allowed_hosts)
    with showing_log_lines(), stop_on_signals(), open_socket(args.host, args.port) as listening:
        predictor = Predictor.load(args.init_model, args.device)
        name = str(args.init_model or "the small model that comes with CLIP4IDC")
        keep_freed_memory()
        start_fork_server()
        with open_upload_folder(args.upload_age, args.upload_space) as uploads:
            # Gradio reads this when it is imported. The folder is deleted with the server.
            os.environ["GRADIO_TEMP_DIR"] = str(uploads.root)
            _forget_proxies()
            from modules.web.page import build_page, page_script, page_style

            page = build_page(predictor, name, uploads)
            file_bytes = MAX_MEGABYTES * 2**20
            look = (page_style(), page_script())
            application = build_application(page, *look, uploads, hosts, proxy_hosts, file_bytes)
            uploads.exempt_current_files()
            show(f"The page: {url_of(args.host, args.port)}  (Ctrl-C ends it)", flush=True)
            run_server(application, listening)


def _set_up_gradio() -> None:
    """Turn off what Gradio reports and records. Raises OSError if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # what visitors do is not written down
    if importlib.util.find_spec("gradio") is None:
        raise OSError(f"the page needs Gradio: {advise_extra('app')}")


def _forget_proxies() -> None:
    """Remove the proxies from the environment, now that the weights are there.

    Gradio would ask this very page through them, and fail at once for a SOCKS proxy.
    """
    for name in list(os.environ):
        if name.lower() in PROXY_VARIABLES:
            del os.environ[name]


def parse_size(text: str) -> int:
    """The bytes of a size such as 500MB, 2 GB or 1000000. Raises ArgumentTypeError for others."""
    found = SIZE.fullmatch(text.strip().lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"{shorten(text)!r} is not a size, such as 500MB or 2GB")
    number, unit = found.groups()
    size = float(number) * SIZE_UNITS[unit]
    if not 1 <= size <= MAX_UPLOAD_SPACE:
        raise argparse.ArgumentTypeError(f"{shorten(text)} is out of range, expected 1 B to 1 EB")
    return int(size)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked. Wrong arguments print one line and exit with 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    names = [name for given in args.allowed_hosts for name in given.split(",")]
    args.allowed_hosts = list(filter(None, names))
    problems = find_problems(args)
    if problems:
        parser.error("; ".join(problems))
    return args


def build_parser() -> OneLineParser:
    """The parser of the command line."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument(
        "--init_model",
        type=Location,
        help="finetuned weights (default: the small model in ckpts/demo)",
    )
    parser.add_argument(
        "--device",
        type=device_name,
        default="auto",
        help="where to compute: auto, cpu, cuda, cuda:NUMBER or mps (default: auto, a GPU or else "
        "the CPU)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, this machine only)",
    )
    parser.add_argument(
        "--port",
        type=bounded(int, 1, 65535),
        default=7860,
        help="port to listen on (default: 7860)",
    )
    parser.add_argument(
        "--allowed_hosts",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="more names that the page answers to, such as that of a web server in front of it "
        "(default: localhost, --host, and on 0.0.0.0 and :: this machine's name and addresses)",
    )
    parser.add_argument(
        "--upload_age",
        type=bounded(float, 1, MAX_UPLOAD_AGE),
        default=3600,
        metavar="SECONDS",
        help="how long an upload is kept at most (default: 3600)",
    )
    parser.add_argument(
        "--upload_space",
        type=parse_size,
        default=2 * 10**9,
        metavar="SIZE",
        help="space for all uploads together, such as 500MB; the oldest are deleted first "
        "(default: 2GB)",
    )
    return parser


def find_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the arguments, a message each."""
    problems = []
    for name in args.allowed_hosts:
        if host_name(name) is None:
            problems.append(f"--allowed_hosts {name} is not a host name")
    if args.init_model == Location(""):
        problems.append("--init_model is empty")
    return problems


def main(argv: list[str] | None = None) -> int:
    """The command line; see --help.

    Returns 0. Every other exit code comes as SystemExit: 2 for what the user can correct, and those
    that `run_command` lists.
    """
    args = parse_arguments(argv)
    return run_command(find_program_name(), lambda: serve(args))


if __name__ == "__main__":
    sys.exit(main())
