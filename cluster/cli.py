"""`mm doctor`, `mm submit`, `mm jobs`."""
import typer
def attach(app: typer.Typer) -> None:
    pass
