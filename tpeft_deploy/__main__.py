"""`python -m tpeft_deploy` is `tpeft-deploy`."""

from tpeft_deploy.cli import main

if __name__ == "__main__":
    main(prog_name="tpeft-deploy")
