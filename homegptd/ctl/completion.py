"""`homegptctl completion SHELL`: scripts that ask the daemon for the models' names."""

from __future__ import annotations

from .asked import usage
from .verbs import VERBS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .asked import Asked

_FILES = ("--socket", "--config", "--to", "--file")
_CHOICES = {"--level": "1 2", "--mode": "active sleep disabled"}
_MODELS = "|".join(
    verb for verb, row in VERBS.items() if row[1] in {"MODEL", "[MODEL]"} and verb != "add"
)
_NUMBERS = "|".join(verb for verb, row in VERBS.items() if row[1] == "ID")


def run(asked: Asked) -> int:
    """Print a script, or (hidden) the words that a script asks for."""
    word = asked.words[0]
    if asked.verb == "__complete":
        print("\n".join(_words(asked, word)))
        return 0
    if word not in SCRIPTS:
        usage(f'there is no completion for "{word}"', "homegptctl completion bash|zsh|fish")
    print(SCRIPTS[word]())
    return 0


def quoted(text: str) -> str:
    """A word for bash and zsh that means exactly `text`."""
    return "'" + text.replace("'", "'\\''") + "'"


def quoted_for_fish(text: str) -> str:
    """A word for fish, which lets a backslash escape inside single quotes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _words(asked: Asked, what: str) -> list[str]:
    from .models import names, numbers

    if what == "models":
        return names(asked.socket)
    return numbers(asked.socket) if what == "operations" else list(VERBS)


def _options(verb: str, *, with_value: bool = False) -> list[str]:
    options = VERBS[verb][2].split()
    return [option.rstrip("=*") for option in options if "=" in option or not with_value]


def _cases(line: Callable[[str], str]) -> str:
    return "\n".join(f"    {verb}) {line(verb)} ;;" for verb in VERBS if _options(verb))


def _bash() -> str:
    cases = _cases(
        lambda verb: (
            f"options='{' '.join(_options(verb))}'"
            f" values=' {' '.join(_options(verb, with_value=True))} '"
        )
    )
    choices = "\n".join(
        f"    {option}) _homegptctl_from '{words}'; return ;;" for option, words in _CHOICES.items()
    )
    # `=` breaks words in bash: --socket=/x comes as three of them
    return f"""\
# source <(homegptctl completion bash)
_homegptctl_from() {{
  mapfile -t COMPREPLY < <(compgen -W "$1" -- "$current")
}}
_homegptctl_files() {{
  compopt -o filenames 2>/dev/null
  mapfile -t COMPREPLY < <(compgen -f -- "$current")
}}
_homegptctl_ask() {{
  _homegptctl_from "$(homegptctl "${{socket[@]}}" __complete "$1" 2>/dev/null)"
}}
_homegptctl_options() {{
  case $1 in
{cases}
  esac
}}
_homegptctl() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} before= verb= options= values= word second= i
  local -a socket=()
  COMPREPLY=()
  [[ $current == '=' ]] && current=
  for ((i = 1; i < COMP_CWORD; i++)); do
    word=${{COMP_WORDS[i]}}
    if [[ $word == '=' ]]; then
      continue
    elif [[ -n $before ]]; then
      [[ $before == --socket ]] && socket=(--socket "$word")
      before=
    elif [[ $word == --socket || ( -n $values && $values == *" $word "* ) ]]; then
      before=$word
    elif [[ $word == -* ]]; then
      continue
    elif [[ -z $verb ]]; then
      verb=$word
      _homegptctl_options "$verb"
    else
      second=$word
    fi
  done
  case $before in
    {"|".join(_FILES)}) _homegptctl_files; return ;;
{choices}
    -*) return ;;
  esac
  if [[ -z $verb ]]; then
    _homegptctl_from {quoted(" ".join(VERBS) + " --socket --json --help --version")}
  elif [[ $current == -* ]]; then
    _homegptctl_from "$options --socket --json --help"
  else
    case $verb in
      {_MODELS}) [[ -n $second ]] || _homegptctl_ask models ;;
      {_NUMBERS}) [[ -n $second ]] || _homegptctl_ask operations ;;
      key) [[ -n $second ]] || _homegptctl_from 'add list remove' ;;
      config) if [[ -z $second ]]; then _homegptctl_from check; else _homegptctl_files; fi ;;
      completion) _homegptctl_from 'bash zsh fish' ;;
      help) _homegptctl_from {quoted(" ".join(VERBS))} ;;
    esac
  fi
}}
complete -F _homegptctl homegptctl"""


def _zsh() -> str:
    verbs = "\n".join(
        f"    {quoted(verb + ':' + row[3].replace(':', chr(92) + ':'))}"
        for verb, row in VERBS.items()
    )
    cases = _cases(
        lambda verb: (
            f"options=({' '.join(_options(verb))})"
            f" values=({' '.join(_options(verb, with_value=True))})"
        )
    )
    choices = "\n".join(
        f"    {option}) compadd -- {words}; return ;;" for option, words in _CHOICES.items()
    )
    return f"""\
#compdef homegptctl
# source <(homegptctl completion zsh)
_homegptctl() {{
  local -a verbs options values socket found
  local verb= second= before= word
  verbs=(
{verbs}
  )
  for word in "${{(@)words[2,CURRENT-1]}}"; do
    if [[ -n $before ]]; then
      [[ $before == --socket ]] && socket=(--socket "$word")
      before=
    elif [[ $word == --socket ]] || (( ${{values[(Ie)$word]}} )); then
      before=$word
    elif [[ $word == --socket=* ]]; then
      socket=("$word")
    elif [[ $word == -* ]]; then
      continue
    elif [[ -n $verb ]]; then
      second=$word
    else
      verb=$word
      case $verb in
{cases}
      esac
    fi
  done
  case $before in
    {"|".join(_FILES)}) _files; return ;;
{choices}
    -*) return ;;
  esac
  if [[ -z $verb ]]; then
    _describe verb verbs
    compadd -- --socket --json --help --version
    return
  fi
  if [[ $PREFIX == -* ]]; then
    compadd -- $options --socket --json --help
    return
  fi
  case $verb in
    {_MODELS})
      [[ -n $second ]] && return
      found=(${{(f)"$(homegptctl $socket __complete models 2>/dev/null)"}})
      compadd -a found ;;
    {_NUMBERS})
      [[ -n $second ]] && return
      found=(${{(f)"$(homegptctl $socket __complete operations 2>/dev/null)"}})
      compadd -a found ;;
    key) [[ -n $second ]] || compadd add list remove ;;
    config) if [[ -z $second ]]; then compadd check; else _files; fi ;;
    completion) compadd bash zsh fish ;;
    help) _describe verb verbs ;;
  esac
}}
if [[ $funcstack[1] == _homegptctl ]]; then
  _homegptctl "$@"
else
  compdef _homegptctl homegptctl
fi"""


_FISH = """\
# homegptctl completion fish | source
function __homegptctl_said --description 'words of the line without options and their values'
  set -l words (commandline -opc)
  set -e words[1]
  set -l skip
  for word in $words
    if set -q skip[1]
      set -e skip[1]
      continue
    end
    switch $word
      case VALUES
        set skip yes
      case '-*'
      case '*'
        echo $word
    end
  end
end
function __homegptctl_in --description 'whether the verb is one of these'
  set -l said (__homegptctl_said)
  test (count $said) -ge 1; and contains -- $said[1] $argv
end
function __homegptctl_first
  test (count (__homegptctl_said)) -le 1
end
function __homegptctl_none
  test (count (__homegptctl_said)) -eq 0
end
function __homegptctl_ask
  set -l socket
  set -l words (commandline -opc)
  for at in (seq (count $words))
    switch $words[$at]
      case --socket
        set socket --socket $words[(math $at + 1)]
      case '--socket=*'
        set socket $words[$at]
    end
  end
  homegptctl $socket __complete $argv[1] 2>/dev/null
end
complete -c homegptctl -f
complete -c homegptctl -l json -d 'JSON output'
complete -c homegptctl -l help -d help
complete -c homegptctl -l socket -r -F -d 'socket of the daemon'"""


def _fish() -> str:
    valued = {"--socket", *(o for verb in VERBS for o in _options(verb, with_value=True))}
    valued.discard("--gpu")  # of `doctor` it has none
    lines = [_FISH.replace("VALUES", " ".join(sorted(valued)))]
    for verb, row in VERBS.items():
        about = quoted_for_fish(row[3])
        lines.append(f"complete -c homegptctl -n __homegptctl_none -a {verb} -d {about}")
        lines += [_fish_option(verb, option) for option in _options(verb)]
    rows = [
        (_MODELS.replace("|", " "), "-a '(__homegptctl_ask models)'"),
        (_NUMBERS.replace("|", " "), "-a '(__homegptctl_ask operations)'"),
        ("key", "-a 'add list remove'"),
        ("config", "-a check"),
        ("completion", "-a 'bash zsh fish'"),
        ("help", f"-a '{' '.join(VERBS)}'"),
    ]
    lines += [
        f"complete -c homegptctl -n '__homegptctl_in {verbs}; and __homegptctl_first' {what}"
        for verbs, what in rows
    ]
    files = "'__homegptctl_in config; and not __homegptctl_first'"
    return "\n".join([*lines, f"complete -c homegptctl -n {files} -F"])


def _fish_option(verb: str, option: str) -> str:
    kind = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
    value = " -x" if option in _options(verb, with_value=True) else ""
    if option in _FILES:
        value = " -r -F"
    if option in _CHOICES:
        value += f" -a '{_CHOICES[option]}'"
    return f"complete -c homegptctl -n '__homegptctl_in {verb}' {kind}{value}"


SCRIPTS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
