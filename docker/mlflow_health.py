"""Ask an MLflow server what a client asks: one logged-in API request; exit 0 when it is answered.

    python mlflow_health.py http://mlflow:5000

The password comes from the server's own environment. The address must be the one that clients use:
a Host header outside --allowed-hosts is answered with 403, while /health stays green.
"""

from __future__ import annotations

import base64
import os
import sys
import urllib.error
import urllib.request

TIMEOUT_S = 20


def main() -> None:
    """Exit 0 if the server answers; else print the reason and exit 1, or 2 for wrong usage."""
    try:
        (url,) = sys.argv[1:]
        user = os.environ["MLFLOW_AUTH_ADMIN_USERNAME"]
        password = os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"]
    except (ValueError, KeyError) as error:
        print(f"usage: mlflow_health.py URL, with MLFLOW_AUTH_ADMIN_* set ({error})")
        sys.exit(2)
    request = urllib.request.Request(f"{url}/api/2.0/mlflow/experiments/search?max_results=1")
    login = base64.b64encode(f"{user}:{password}".encode()).decode()
    request.add_header("Authorization", f"Basic {login}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            answer.read()
    except (urllib.error.URLError, OSError) as error:
        print(f"{url}: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
