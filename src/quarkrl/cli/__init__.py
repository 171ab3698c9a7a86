"""The command `quarkrl`: one file per subcommand, `main.py` that runs one, and what they share.

A subcommand is a module with

    NAME                    as typed: `quarkrl NAME`
    HELP                    one line for `quarkrl --help`
    add_options(parser)     its positional arguments, and `parser.add_flags(parser, SomeOptions, …)` for the rest
    run(arguments)          what it does; a mistake of the user raises `UserError`

`train` has `parse(argv)` in place of `add_options`, since its options may come from a file (`config_file.py`). Options
are dataclasses declared by `quarkrl.options.option`. These modules import torch, transformers and whatever imports them
only inside functions, so that `--help` is immediate.

    parser.py    dataclasses → flags → dataclasses, and the errors of parsing
    inputs.py    checks of what options name, before torch and transformers are imported
    streams.py   standard input, output and error in any encoding
    common.py    options of rewards, sources of prompts, the names `builtin`, messages, progress bars
"""
