"""`cosa-ray ui`: MLflow's pages for the runs of this folder."""

from __future__ import annotations

from typing import Annotated

import typer

from cosa_ray.cli.output import say


def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve on.")] = 5000,
    host: Annotated[
        str, typer.Option(help="Address to serve on; whoever reaches it can change and delete runs.")
    ] = "127.0.0.1",
    uri: Annotated[
        str | None, typer.Option(help="MLflow store; default MLFLOW_TRACKING_URI, else mlflow.db in this folder.")
    ] = None,
) -> None:
    """Show the runs in a browser until Ctrl-C: compare, plot, look at pictures.

    Examples: cosa-ray ui; cosa-ray ui --uri sqlite:///elsewhere/mlflow.db --port 5001
    """
    import signal

    from cosa_ray.tracking.refusal import is_server
    from cosa_ray.tracking.ui import Pages, shown, store_to_show

    store = store_to_show(uri)
    if is_server(store):
        print(shown(store))
        return
    # Ended by a service manager, a closed terminal or from a background shell, the server must go as with Ctrl-C.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    say(f"starting MLflow on {shown(store)} ...")
    if host not in ("127.0.0.1", "localhost", "::1"):
        say(f"warning: on {host} everybody who reaches this machine can change and delete runs")
    try:
        with Pages(store, host=host, port=port) as pages:
            print(pages.link(), flush=True)
            say("Ctrl-C stops it")
            pages.wait()
    except KeyboardInterrupt:
        say("stopped")
