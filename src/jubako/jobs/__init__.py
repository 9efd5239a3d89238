"""Durable jobs: recorded before they are accepted, run after any crash, their results kept as files.

``ledger`` records what clients see, ``durable`` (DBOS) sees to it that all that is recorded is run,
``execution`` runs one job on the families, ``store`` keeps files, ``desk`` is what routes speak to.
"""
