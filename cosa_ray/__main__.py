"""`python -m cosa_ray` is the command `cosa-ray`."""

from cosa_ray.cli.main import main

main()
