"""Commands about model families: those that are known, and a table for one that is not."""

import click

from quantkit.cli.common import one_line_errors, quiet


@click.group(invoke_without_command=True)
@click.pass_context
def families(context: click.Context) -> None:
    """The model families that are known, with the folds of each; `discover` finds the table of another."""
    if context.invoked_subcommand is not None:
        return
    from quantkit.families import FAMILIES

    for family in FAMILIES:
        click.echo(f"{family.name:10} model_type {', '.join(family.model_types)}")
        for fold in family.folds:
            click.echo(f"{'':10} {fold.producer} -> {', '.join(fold.consumers)}")


@families.command()
@click.argument("model")
def discover(model: str) -> None:
    """Find a family's table on a small random twin of MODEL: a folder, a Hub id (its headers are fetched), or a config.json.

    The table is printed as YAML, the evidence beside each line; `quantize --family FILE` reads it.
    """
    with one_line_errors():
        quiet()
        from quantkit.discover import as_yaml
        from quantkit.discover import discover as found_for
        from quantkit.model.hub import config_of

        click.echo(as_yaml(found_for(config_of(model))), nl=False)
