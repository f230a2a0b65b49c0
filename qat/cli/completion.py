"""Completion of `qat` in bash. Hydra's own script asks the program without a command, which has nothing to say."""

from qat.cli import COMMANDS
from qat.errors import UserError

SCRIPT = r"""_qat() {
    local line="${COMP_LINE:0:COMP_POINT}" words word choices=
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    word="${words[${#words[@]}-1]}"
    if (( ${#words[@]} < 3 )); then
        choices="COMMANDS"
        compopt +o nospace 2>/dev/null
    elif [[ " train sensitivity search " == *" ${words[1]} "* ]]; then
        choices=$(COMP_LINE="${words[*]:1}" "${words[0]}" train --shell-completion query=bash 2>/dev/null)
    fi
    COMPREPLY=($(compgen -W "$choices" -- "$word"))
    [[ $COMP_WORDBREAKS == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*=}"}"}")
}
complete -o nospace -o default -F _qat qat"""
"""Bash replaces what stands behind the last `=`, unless that breaks no words; `words` takes the command for the program
that Hydra expects at the start."""


def completion(wanted: list[str]) -> str:
    """What the shell is to evaluate.

    Raises:
        UserError: for another shell.
    """
    if wanted == ["install=bash"]:
        return SCRIPT.replace("COMMANDS", " ".join(COMMANDS))
    if wanted == ["uninstall=bash"]:
        return "complete -r qat; unset -f _qat"
    raise UserError('--shell-completion: there is one for bash: eval "$(qat train --shell-completion install=bash)"')
