"""`contralto hub`: list, write and upload the repositories for `generate(custom_generate=...)`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command.

    Args:
        parser: its parser.
    """
    from contralto.decoding.hub.repositories import REPOSITORIES

    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("list", help="list the repositories and their arguments")
    write = actions.add_parser("write", help="write repositories to a folder, a subfolder for each")
    write.add_argument("output", type=Path, metavar="DIR", help="the folder")
    write.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(REPOSITORIES)}; all by default")
    push = actions.add_parser("push", help="upload a repository, with the token of `hf auth login` or of HF_TOKEN")
    push.add_argument("name", metavar="NAME", help=f"which: {', '.join(REPOSITORIES)}")
    push.add_argument("repo_id", metavar="REPO", help="USER/NAME or ORGANISATION/NAME on the Hub")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--dry-run", action="store_true", help="print the files, and upload nothing")
    for action in actions.choices.values():
        action.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run(args: argparse.Namespace) -> None:
    """Run the action.

    Args:
        args: the parsed flags.
    """
    {"list": _list, "write": _write, "push": _push}[args.action](args)


def _list(args: argparse.Namespace) -> None:
    from contralto.decoding.hub.repositories import REPOSITORIES

    for repository in REPOSITORIES.values():
        names = ", ".join(each.name for each in repository.arguments)
        print(f"{repository.name}: {repository.declaration.description}\n    {names}")


def _write(args: argparse.Namespace) -> None:
    from contralto.decoding.hub.contents import files, write
    from contralto.decoding.hub.repositories import REPOSITORIES

    made = {name: files(name, str(args.output / name)) for name in args.names or REPOSITORIES}
    for name, contents in made.items():
        write(args.output / name, contents)
        print(args.output / name)


def _push(args: argparse.Namespace) -> None:
    from contralto.decoding.hub.upload import contents_of, push

    if not args.dry_run:
        print(push(args.name, args.repo_id, private=args.private))
        return
    for path, text in contents_of(args.name, args.repo_id).items():
        print(f"--- {args.repo_id}/{path}\n{text}")
