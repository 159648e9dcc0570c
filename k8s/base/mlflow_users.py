"""Set MLflow's two users from the Secrets; the server's pod runs this before each start.

MLflow itself creates only the admin, at the first start, and never reads the Secret again: training
would have no user of its own, and no password could be rotated.
"""

from __future__ import annotations

import os
import sys

from mlflow.exceptions import MlflowException
from mlflow.server.auth import auth_config, store


def main() -> None:
    admin, training = os.environ["MLFLOW_ADMIN_USERNAME"], os.environ["MLFLOW_TRAINING_USERNAME"]
    if admin == training:
        sys.exit(
            f"username = {admin!r} in both Secrets, lwo-dist-mlflow and lwo-dist-mlflow-training:"
            " training must not be the admin; give it another name"
        )
    store.init_db(auth_config.database_uri)
    set_user(admin, os.environ["MLFLOW_ADMIN_PASSWORD"], "lwo-dist-mlflow", is_admin=True)
    set_user(
        training,
        os.environ["MLFLOW_TRAINING_PASSWORD"],
        "lwo-dist-mlflow-training",
        is_admin=False,
    )


def set_user(name: str, password: str, secret: str, *, is_admin: bool) -> None:
    try:
        if store.has_user(name):
            store.update_user(name, password=password, is_admin=is_admin)
        else:
            store.create_user(name, password, is_admin=is_admin)
    except MlflowException as error:
        sys.exit(f"Secret {secret}: {error.message}")


if __name__ == "__main__":
    main()
