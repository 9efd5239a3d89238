"""The BentoML services: one a family, and the gateway in front of them. Only this package speaks HTTP."""

from jubako.services.family import family_service
from jubako.services.gateway import gateway_service

__all__ = ["family_service", "gateway_service"]
