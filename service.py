"""The deployment at a glance: a service for each family, and the gateway that routes to them by model name.

Serve everything with ``bentoml serve --host 127.0.0.1``, or with keys (docs/security.md) on any address; one
family alone with ``bentoml serve service:SD``, and some of them with ``JUBAKO_FAMILIES=sd,sdxl``.
"""

import os

from jubako.services import family_service, gateway_service

# BentoML would give each service a GPU index of its own, whether that GPU exists or not; the families are
# placed by JUBAKO_DEVICE or by the container they run in.
os.environ.setdefault("BENTOML_DISABLE_GPU_ALLOCATION", "1")

SD = family_service("sd")
SDXL = family_service("sdxl")
SD3 = family_service("sd3")
Video = family_service("video")
Mesh = family_service("mesh")

Gateway = gateway_service(sd=SD, sdxl=SDXL, sd3=SD3, video=Video, mesh=Mesh)
