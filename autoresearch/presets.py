"""The coding agents as data: what each is called by, what it may touch, and how its output is read."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from autoresearch import replies
from autoresearch.replies import Answer, Output

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Agent:
    """A command that edits train.py where it stands and says what it did.

    In `command`, `env`, `files` and `stdin` stand, in braces: `tree` for its working directory, `glob` and `regex` for
    patterns that match just that, `folder` for the experiment's folder, `side` for the path, but for an ending, of what
    it may write there, `prompt` for the text of the prompt, `json` for the same as a JSON string, and `file` for the
    file that holds it. The word `model` becomes `flag` and the model that a person named, or nothing.
    """

    name: str
    command: tuple[str, ...]
    read: Callable[[Output], Answer] = replies.read_text
    install: str = ""
    flag: str = "--model"
    stdin: str = "{file}"
    env: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # written into the experiment's folder first
    verbatim: bool = False  # a person's own command, in which braces are the shell's
    status: tuple[str, ...] = ()  # exits with 0 when it is logged in; empty where it cannot be asked offline
    login: str = ""  # the cure
    dollars: bool = False  # whether it says what a call cost
    model: str | None = None
    price: tuple[float, float, float] | None = None  # dollars for a million tokens: input, cached input, output


# Each is confined to the one file as far as its command line goes, and told to leave the waiting to us where it can be.
PRESETS = {agent.name: agent for agent in (
    Agent(
        "claude",
        ("claude", "-p", "--output-format", "json", "--safe-mode", "--no-session-persistence",
         "--tools", "Read,Edit,Write,Grep,Glob", "--permission-mode", "dontAsk",
         "--allowedTools", "Edit(/{glob}/train.py)", "--max-turns", "30", "--max-budget-usd", "1", "{model}"),
        replies.read_claude, "npm install -g @anthropic-ai/claude-code", dollars=True,
        status=("claude", "auth", "status"), login="claude auth login",
        env={"CLAUDE_CODE_MAX_RETRIES": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
             "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1"},
    ),
    Agent(
        "codex",
        ("codex", "exec", "--json", "--ephemeral", "--sandbox", "workspace-write", "--disable", "plugins",
         "-c", "sandbox_workspace_write.exclude_slash_tmp=true",
         "-c", "sandbox_workspace_write.exclude_tmpdir_env_var=true", "{model}", "-"),
        replies.read_codex, "npm install -g @openai/codex", login="codex login",
        # of a key in the environment and of a provider of one's own it knows nothing here
        status=("sh", "-c", 'test -n "$CODEX_API_KEY" || codex login status || '
                "grep -qs '^ *model_provider *=' \"${CODEX_HOME:-$HOME/.codex}/config.toml\""),
    ),
    Agent(
        "gemini",
        ("gemini", "--output-format", "json", "--skip-trust", "-e", "none", "--policy", "{folder}/gemini.toml",
         "{model}"),
        replies.read_gemini, "npm install -g @google/gemini-cli",
        env={"GEMINI_CLI_SYSTEM_SETTINGS_PATH": "{folder}/gemini.json", "TMPDIR": "{folder}", "NO_COLOR": "1"},
        files={
            "gemini.json": """{"general": {"maxAttempts": 1, "retryFetchErrors": false, "enableAutoUpdate": false},
                               "model": {"maxSessionTurns": 30}, "hooksConfig": {"enabled": false}}""",
            "gemini.toml": """\
                [[rule]]
                toolName = "*"
                decision = "deny"
                priority = 900
                [[rule]]
                toolName = ["read_file", "list_directory", "glob", "grep_search", "update_topic", "complete_task"]
                decision = "allow"
                priority = 910
                [[rule]]
                toolName = "replace"
                argsPattern = '\\x00"file_path":"(\\./|{regex}/)?train\\.py"\\x00'
                decision = "allow"
                priority = 920""",
        },
    ),
    Agent(
        "opencode",
        ("opencode", "run", "--format", "json", "--pure", "--title", "an experiment", "{model}"),
        replies.read_opencode, "npm install -g opencode-ai", "-m", dollars=True,
        env={"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_PROJECT_CONFIG": "1",
             "OPENCODE_DISABLE_LSP_DOWNLOAD": "1", "OPENCODE_DISABLE_CLAUDE_CODE": "1",
             "OPENCODE_CONFIG_CONTENT": """{"share": "disabled", "autoupdate": false, "snapshot": false, "lsp": false,
                "formatter": false, "permission": {"*": "deny", "read": "allow", "grep": "allow", "glob": "allow",
                "list": "allow", "edit": {"*": "deny", "train.py": "allow"}}}"""},
    ),
    Agent(
        "aider",  # at the end of its input it takes a question for answered with yes, so it is given many a no
        ("aider", "--message-file", "{file}", "--file", "train.py", "--no-git", "--no-gitignore", "--no-auto-commits",
         "--no-dirty-commits", "--no-analytics", "--analytics-log", "{side}.analytics.jsonl",
         "--llm-history-file", "{side}.llm.txt", "--chat-history-file", "{side}.chat.md",
         "--input-history-file", "{side}.input.txt", "--no-check-update", "--no-show-release-notes",
         "--no-show-model-warnings", "--no-detect-urls", "--no-suggest-shell-commands", "--no-auto-lint",
         "--no-auto-test", "--map-tokens", "0", "--no-stream", "--no-pretty", "--no-fancy-input", "{model}"),
        replies.read_aider, "uv tool install aider-chat", stdin="{folder}/aider.txt", files={"aider.txt": "n\n" * 200},
        dollars=True,
    ),
    Agent(
        "qwen",
        ("qwen", "--auth-type", "openai", "--approval-mode", "default", "-o", "json", "--max-session-turns", "30",
         "--core-tools", "read_file,grep_search,glob,list_directory,edit",
         "--exclude-tools", "enter_worktree,exit_worktree,record_artifact,tool_call,tool_search,list_agents,task_stop,"
         "send_message,report_findings,get_goal,update_goal", "{model}"),
        replies.read_qwen, "npm install -g @qwen-code/qwen-code",
        env={"QWEN_CODE_SYSTEM_SETTINGS_PATH": "{folder}/qwen.json", "NO_COLOR": "1"},
        files={"qwen.json": """{"general": {"enableAutoUpdate": false, "chatRecording": false},
            "model": {"generationConfig": {"maxRetries": 0}}, "permissions": {"allow": ["Read(/**)", "Edit(/train.py)"],
            "deny": ["Bash", "Write", "WebFetch", "Agent", "Skill"]}, "$version": 4}"""},
    ),
    Agent(
        "pi",
        ("pi", "-p", "--mode", "json", "--no-session", "--no-extensions", "--no-skills", "--no-prompt-templates",
         "--no-themes", "--no-context-files", "--no-approve", "--tools", "read,edit",
         "-e", "{folder}/guard.mjs", "{model}"),
        replies.read_pi, "npm install -g @earendil-works/pi-coding-agent", dollars=True,
        env={"PI_TELEMETRY": "0"},
        files={"guard.mjs": """\
            import { realpathSync } from "node:fs";
            import { resolve } from "node:path";
            const real = (path) => { try { return realpathSync(path); } catch { return path; } };
            export default function (pi) {
                pi.on("tool_call", async (event, context) => {
                    const at = (path) => real(resolve(context.cwd ?? process.cwd(), path));
                    const path = String(event.input?.path);
                    if (event.toolName === "read") return undefined;
                    if (event.toolName === "edit" && at(path) === at("train.py")) return undefined;
                    return { block: true, reason: "Only ./train.py may be edited." };
                });
            }"""},
    ),
    Agent(
        "mini",  # its only tool is a shell
        ("mini", "-y", "--exit-immediately", "-c", "mini.yaml", "-c", "model.model_kwargs.max_retries=0",
         "-c", "agent.step_limit=30", "-c", "{folder}/task.yaml", "-o", "{side}.traj.json", "{model}"),
        replies.read_mini, "uv tool install mini-swe-agent", "-m", stdin=os.devnull, dollars=True,
        env={"MSWEA_CONFIGURED": "true", "MSWEA_SILENT_STARTUP": "1", "MSWEA_COST_TRACKING": "ignore_errors",
             "MSWEA_MODEL_RETRY_STOP_AFTER_ATTEMPT": "1"},
        files={"task.yaml": '{"run": {"task": {json}}}'},
    ),
    Agent(  # this one and the next are from their documentation alone
        "cursor",
        ("cursor-agent", "-p", "--force", "--trust", "--output-format", "json", "{model}", "{prompt}"),
        replies.read_claude, "see https://cursor.com/cli", stdin=os.devnull,
    ),
    Agent(
        "kiro",
        ("kiro-cli", "chat", "--no-interactive", "--v2", "--trust-tools=read,write,grep,glob", "{model}"),
        install="see https://kiro.dev/cli",
    ),
)}  # fmt: skip
BUILT_IN = {
    # -P: the tree, which is its working directory, is not where its code comes from
    "random": Agent(
        "random",
        (sys.executable, "-P", "-m", "autoresearch.random_agent"),
        replies.read_free,
        env={"PYTHONPATH": str(ROOT)},
        dollars=True,
    ),
}
