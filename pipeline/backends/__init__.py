"""Where engines are built and run; each backend imports its runtime only when it is used."""
