# fish completion for moectl; made by `moectl completion fish`.

function __moectl_complete
    set -l program (string replace -r '^~/' "$HOME/" -- (commandline -opc | string match -v -- '*=*')[1])
    set -l line (commandline -cp | string collect)
    set -l option (string match -r -- '^--[^=]+=' (commandline -ct))
    for offer in (env COMP_LINE="$line" _MOECTL_COMPLETE=fish_complete $program 2>/dev/null)
        set -l parts (string split -m 2 \t -- $offer)
        switch $parts[1]
            case file
                for path in (__fish_complete_path "$parts[2]")
                    printf "%s\n" "$option$path"
                end
            case dir
                for path in (__fish_complete_directories "$parts[2]")
                    printf "%s\n" "$option$path"
                end
            case plain
                string join \t -- $parts[2..]
        end
    end
end

complete --no-files --keep-order --command moectl --arguments '(__moectl_complete)'
