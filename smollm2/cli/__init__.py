"""The command `smollm2`: a file per command, with its flags and its handler.

Read main.py (parser, dispatch, exit codes), then the file of a command. flags.py holds what several commands share,
run_flags.py the flags of `train` and `plan`, environment.py what a launcher leaves in the environment, launch.py what run_training.sh starts.

A handler imports torch only when it runs: help, config errors and `plan` take under 0.6 s.
"""
