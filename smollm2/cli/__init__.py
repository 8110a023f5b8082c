"""The command `smollm2`: one file per subcommand, with its flags and its handler.

Read main.py (parser, dispatch, exit codes), then the file of a command. flags.py has what several commands share,
run_flags.py the flags of `train`, `plan` and `prepare`, environment.py the variables that a launcher sets, and launch.py the
entry point of run_training.sh.

A handler imports torch only when it runs, so help, config errors and `plan` take under 0.6 s.
"""
