"""`llmprune push DIR [ID]`: a saved checkpoint to the Hub, again or for the first time."""

from __future__ import annotations

from pathlib import Path

import click

from llmprune.checkpoint.hub import Destination, check_access
from llmprune.checkpoint.push import Pushed, push
from llmprune.checkpoint.verify import verify

__all__ = ["command", "told"]


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("repo_id", metavar="[ID]", required=False)
@click.option("--private", is_flag=True, help="Make a new repository private; an existing one stays as it is.")
@click.option("--revision", metavar="BRANCH", help="Push to this branch, made from main if there is none.")
@click.option("--create-pr", is_flag=True, help="Open a pull request in place of a commit to main.")
def command(*, directory: Path, repo_id: str | None, private: bool, revision: str | None, create_pr: bool) -> None:
    """Verify the checkpoint in DIR and push it to the Hub, as ID or under the directory's name.

    Asks the Hub first whether you may write there, deletes older weights of the repository in the same commit, and
    compares every file with what the Hub then has. A push that broke off is completed by running it again.
    """
    directory = directory.resolve()
    to = check_access(Destination(repo_id or "", private, revision, create_pr), directory.name)
    try:
        verify(directory, reload=False).raise_if_failed()
        _say(f"{directory} is what its report says.")
        pushed = push(directory, to, say=_say)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(str(directory)) from None
    click.echo(told(pushed))


def told(pushed: Pushed) -> str:
    """The outcome in one line."""
    return f"{pushed.url}, commit {pushed.commit}: {pushed.files} files, all as they are here."


def _say(sentence: str) -> None:
    click.echo(sentence, err=True)
