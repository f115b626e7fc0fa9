"""Commands for a run that is done: card, report, verify, publish."""

import json
import sys

import click

from quantkit.cli.common import ADAPTER, JSON, one_line_errors, quiet


@click.command()
@click.argument("folder", metavar="DIR")
@click.option("--base-model", metavar="ID", help="The base model's Hub id, where the run was given a folder: front matter, links.")
@click.option(
    "--base-card", metavar="CARD", help="The base model's card: a file, a folder or a Hub id. [default: the one beside its weights]"
)
@click.option("--repo-id", metavar="NAME", help="As which the commands on the card name it: owner/name.")
@click.option("--contact", metavar="MAIL|LINK", envvar="QUANTKIT_CONTACT", show_envvar=True, help="A mail address or a link.")
@click.option("--calibration-link", metavar="LINK", help="Where the calibration set lies. [default: its section on the card]")
@click.option("--template", metavar="FILE", help="Another Jinja template; quantkit/publish/card.md.jinja shows what it is given.")
def card(
    folder: str,
    base_model: str | None,
    base_card: str | None,
    repo_id: str | None,
    contact: str | None,
    calibration_link: str | None,
    template: str | None,
) -> None:
    """Write the model card anew (README.md) from the run's report; DIR is a run's folder, or an artefact in it."""
    with one_line_errors():
        from quantkit import release

        made = release.card(
            folder,
            base_model=base_model,
            base_card=base_card,
            repo_id=repo_id,
            contact=contact,
            calibration_link=calibration_link,
            template=template,
        )
        for path, notes in made.items():
            click.echo(path)
            for note in notes:
                click.echo(f"quantkit: {note}", err=True)


@click.command()
@click.argument("folder", metavar="DIR")
def report(folder: str) -> None:
    """Draw a run's report: report.html, one page that needs nothing else, and its pictures as PNGs."""
    with one_line_errors():
        from quantkit.publish.report_page import write_report

        click.echo(write_report(folder))


@click.command()
@click.argument("folder", metavar="DIR")
@click.option("--base-model", metavar="MODEL", help="The original, a folder or a Hub id: a sample of linears is held against it.")
@ADAPTER
@JSON
def verify(folder: str, base_model: str | None, adapter: str | None, as_json: bool) -> None:
    """Check hashes, shapes, numbers, sizes and errors, and say which engine will load it; exit 1 when anything is off."""
    with one_line_errors():
        from quantkit import release

        if base_model:
            quiet()
        found = release.verify(folder, base_model=base_model, adapter=adapter)
        if as_json:
            click.echo(json.dumps({str(one.folder): verified.as_json() for one, verified in found}, ensure_ascii=False))
        else:
            for one, verified in found:
                click.echo(f"{one.folder} ({one.format})")
                for line in verified.lines():
                    click.echo(f"  {line}")
        if not all(verified.good for _, verified in found):
            sys.exit(1)


@click.command()
@click.argument("folder", metavar="DIR")
@click.option("--repo-id", required=True, metavar="NAME", help="owner/name on the Hub; made where it does not exist.")
@click.option("--private/--public", default=None, help="Of a repository that is made. [default: the account's]")
@click.option("--revision", metavar="BRANCH", help="A branch, made where it does not exist. [default: main]")
@click.option("--collection", metavar="NAME", help="Add it to a collection: a slug (owner/title-id) or a title.")
@click.option("--force", is_flag=True, help="Publish although a check or the gate failed; a folder without card is never published.")
@click.option("--dry-run", is_flag=True, help="Check, and list what would go; the Hub is not asked.")
def publish(
    folder: str, repo_id: str, private: bool | None, revision: str | None, collection: str | None, force: bool, dry_run: bool
) -> None:
    """Verify an artefact and put it on the Hub in one commit; an upload that broke off goes on with the same command."""
    with one_line_errors():
        from quantkit import release

        quiet()
        for line in release.publish(
            folder, repo_id, private=private, revision=revision, collection=collection, force=force, dry_run=dry_run, tell=_to_stderr
        ):
            click.echo(line)


def _to_stderr(line: str) -> None:
    click.echo(line, err=True)


COMMANDS = (card, report, verify, publish)
