"""Qwen Code."""

from dataclasses import replace

from autoresearch.agents import claude
from autoresearch.agents.agent import SILENT, Agent, Answer, Output, count, string, words


def read(output: Output) -> Answer:
    """Claude Code's format, but for the place of the error, and tokens in that include cached ones.
    At a limit, an object on standard error alone."""
    if not output.text().strip():
        return Answer(error=string(output.last_error(), "message") or SILENT)
    answer, last = claude.read(output), output.objects()[-1]
    tokens, error = count([last], "usage.input_tokens"), string(last, "error.message")
    return replace(answer, tokens_in=tokens, error=error)


SETTINGS = """{
    "general": {"enableAutoUpdate": false, "chatRecording": false},
    "model": {"generationConfig": {"maxRetries": 0}},
    "permissions": {"allow": ["Read(/**)", {edits}],
                    "deny": ["Bash", "Write", "WebFetch", "Agent", "Skill"]}, "$version": 4}"""

AGENT = Agent(
    "qwen",
    words(
        """qwen --auth-type openai --approval-mode default -o json --max-session-turns 30
        --core-tools read_file,grep_search,glob,list_directory,edit --exclude-tools
        enter_worktree,exit_worktree,record_artifact,tool_call,tool_search,list_agents,"""
        """task_stop,send_message,report_findings,get_goal,update_goal {model}"""
    ),
    read,
    install="npm install -g @qwen-code/qwen-code",
    edit='"Edit(/{path})"',
    env={"QWEN_CODE_SYSTEM_SETTINGS_PATH": "{folder}/qwen.json", "NO_COLOR": "1"},
    files={"qwen.json": SETTINGS},
)
