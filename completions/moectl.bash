# shellcheck shell=bash
# bash completion for moectl; made by `moectl completion bash`. It does without what bash 3.2, which is macOS's, lacks.

_moectl() {
    local kind value program=$1
    case $program in
        \~/*) program=$HOME/${program:2} ;;
    esac
    COMPREPLY=()
    while IFS=$'\t' read -r kind value _; do
        case $kind in
            file) _moectl_files default ;;
            dir) _moectl_files dirnames ;;
            plain) COMPREPLY[${#COMPREPLY[@]}]=$value ;;
        esac
    done < <(COMP_LINE="$COMP_LINE" COMP_POINT="$COMP_POINT" COMP_WORD="$2" \
        _MOECTL_COMPLETE=bash_complete "$program" 2>/dev/null)
}

# Without compopt (bash 3.2) an empty answer brings files by itself: see below.
_moectl_files() {
    if type compopt >/dev/null 2>&1; then
        compopt -o "$1"
    fi
}

if ! type compopt >/dev/null 2>&1; then
    complete -o default -F _moectl moectl
elif ! complete -o nosort -F _moectl moectl 2>/dev/null; then
    complete -F _moectl moectl
fi
