#!/bin/sh
# Runs what it is given; before that, says what to do where the runs cannot be written.
if ! [ -w /runs ]; then
    echo "note: user $(id -u) cannot write to /runs. Make the folder first and run as its owner:" >&2
    echo "      mkdir -p runs && docker run --rm --user \"\$(id -u):\$(id -g)\" -v \"\$PWD/runs:/runs\" ..." >&2
fi
exec "$@"
