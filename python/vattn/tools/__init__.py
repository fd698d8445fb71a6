"""What the command line runs: ``info``, ``plan``, ``replay`` and ``demo``.

Nothing here is part of the library's API, and nothing here is imported by it. Each command runs with no extras
installed; ``info`` runs even when the native part of the package cannot be imported.
"""
