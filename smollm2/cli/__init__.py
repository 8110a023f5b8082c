"""The command `smollm2`: one file per subcommand, with its flags and its handler.

Read main.py (parser, dispatch, exit codes), then the file of a command. flags.py holds what several commands share,
run_flags.py the flags of `train` and `plan`, environment.py a launcher's variables, launch.py the run_training.sh entry.

A handler imports torch only when it runs: help, config errors and `plan` take under 0.6 s.
"""
