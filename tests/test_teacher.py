"""The teacher's questions: from a model and from a server, kept and thrown away, gone on with, and every mistake."""

import json
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import score
import teacher
from conftest import read_jsonl, script
from test_mistakes import assert_mistake

PASSAGES = {
    "관우": "관우(關羽)는 하동군 해현 사람으로 자는 운장이다. 219년에 번성을 쳤다.",
    "장비": "장비(張飛)는 탁군 사람이다. 장판에서 조조의 군사를 막았다.",
    "마초": "마초(馬超)는 부풍군 사람이다. 동관에서 조조와 싸웠다.",
}
REPLIES = {
    "관우": "네, 만들었습니다.\n1. **질문:** 관우의 자는 무엇인가?\n   **답:** 운장\n\n"
    "2. 질문: 관우는 어느 고을 사람인가? / 답: 하동군 해현\n"
    "질문: 관우가 번성을 친 해는?\n답: 서기 219년\n질문: 관우의 자는 운장인가?\n답: 운장\n답: 번성\n"
    "질문: 관우의 자는 무엇인가\n답: 운장\n질문: 관우의 아버지는?\n답:\n",
    "장비": "<think>질문: 무엇을 물을까?\n답: 장판</think>\nQ: 장비는 어느 군 사람인가?\nA: 탁군\n"
    "질문: 장비와 싸운 사람의 자는?\n답: 조조\n질문: 장비가 조조의 군사를 막은 곳은?\n답: 장판",
    "마초": "도와드릴 수 없습니다.",
}
KEPT = [
    ("관우", "관우의 자는 무엇인가?", "운장", "teacher-7-1-1"),
    ("관우", "관우는 어느 고을 사람인가?", "하동군 해현", "teacher-7-1-2"),
    ("장비", "장비는 어느 군 사람인가?", "탁군", "teacher-8-1-1"),
    ("장비", "장비와 싸운 사람의 자는?", "조조", "teacher-8-1-2"),
]
DROPPED = [
    {"not a span": 2, "question contains the answer": 1, "no question": 1, "asks the same as another": 1},
    {},
    {"unreadable reply": 1},
]


def chat(title: str, question: str, answer: str, name: str, kind: str = "teacher") -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "title": title, "id": name, "kind": kind}


@pytest.fixture
def train_file(tmp_path):
    """Three articles of one passage, one of them in two copies, and a row that is no article."""
    rows = [
        chat(title, f"{title}에 대해 알려줘.", text, f"article-{number}-1", "article")
        for number, (title, text) in enumerate(PASSAGES.items(), 7)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text(teacher.to_lines([*rows, rows[0], chat("관우", "관우의 자는?", "운장", "x", "facts")]))
    return path


@pytest.fixture
def server():
    """Answers by REPLIES; `asked` holds the requests, and `failures` what it says first, as (code, body)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            peer.asked.append((self.path, dict(self.headers), body))
            code, said = peer.failures.pop(0) if peer.failures else (200, None)
            if said is None:
                prompt = body["messages"][0]["content"]
                title = next(title for title, text in PASSAGES.items() if text in prompt)
                # 장비's reply is cut off, so that its last line does not count.
                reason = "length" if title == "장비" else "stop"
                message = {"role": "assistant", "content": REPLIES[title]}
                said = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": reason}]})
            self.send_response(code)
            self.end_headers()
            self.wfile.write(said.encode())

        def log_message(self, *_):
            pass

    peer = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    peer.asked, peer.failures, peer.url = [], [], f"http://127.0.0.1:{peer.server_port}/v1"
    threading.Thread(target=peer.serve_forever, args=[0.01], daemon=True).start()
    yield peer
    peer.shutdown()
    peer.server_close()


@pytest.fixture
def teach(train_file, server, monkeypatch):
    """Runs the tool in this process, against the server; returns (rows, lines of the progress file)."""
    monkeypatch.setattr(teacher, "WAITS", (0, 0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def run_tool(*arguments) -> tuple[list[dict], list[dict]]:
        output = train_file.with_name("teacher.jsonl")
        command = ["--train_file", train_file, "--output_file", output, "--base_url", server.url, "--model", "m"]
        monkeypatch.setattr(sys, "argv", ["teacher.py", *map(str, [*command, *arguments])])
        teacher.main()
        return read_jsonl(output), read_jsonl(f"{output}.progress.jsonl")

    return run_tool


def said_by(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_spans_are_kept_and_the_rest_is_counted(train_file, server, tmp_path):
    command = ("tools/teacher.py", "--train_file", train_file, "--base_url", f"{server.url}/", "--model", "a/model")
    env = {"OPENAI_API_KEY": "secret", "no_proxy": "127.0.0.1"}
    output = tmp_path / "new" / "teacher.jsonl"
    result = script(*command, "--output_file", output, "--max_new_tokens", "99", "--batch_size", "1", env=env)
    assert read_jsonl(output) == [chat(*kept) for kept in KEPT]
    _, *lines = read_jsonl(tmp_path / "new" / "teacher.jsonl.progress.jsonl")
    assert [line["id"] for line in lines] == ["teacher-7-1", "teacher-8-1", "teacher-9-1"]
    assert [line["kept"] for line in lines] == [2, 2, 0] and [line["dropped"] for line in lines] == DROPPED
    assert "3 passages (0 more left out for the quiz), 0 done before, 3 to show a/model now" in result.stdout
    assert "4 questions on 3 passages; thrown away: not a span 2, question contains the answer 1" in result.stdout

    assert len(server.asked) == 3
    path, headers, body = server.asked[0]
    assert path == "/v1/chat/completions" and headers["Content-Type"] == "application/json"
    assert headers["Authorization"] == "Bearer secret"
    assert set(body) == {"model", "messages", "temperature", "max_tokens"}
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("a/model", 0, 99)
    (message,) = body["messages"]
    assert message["role"] == "user" and "질문을 5개" in message["content"] and "{" not in message["content"]
    assert f"제목: 관우\n글: {PASSAGES['관우']}" in message["content"]
    assert not any(text in row["messages"][0]["content"] for text in PASSAGES.values() for row in read_jsonl(output))


def test_a_local_model(train_file, tiny_model, tmp_path):
    """The random model writes nothing readable; that is counted, and the second run loads no model."""
    command = ("tools/teacher.py", "--train_file", train_file, "--model", tiny_model, "--max_new_tokens", "8")
    command += ("--output_file", tmp_path / "teacher.jsonl", "--limit", "2", "--batch_size", "2")
    assert "0 questions on 2 passages; thrown away: unreadable reply 2" in script(*command).stdout
    (tiny_model / "config.json").rename(tmp_path / "config.json")
    try:
        assert "2 done before, 0 to show" in script(*command).stdout
    finally:
        (tmp_path / "config.json").rename(tiny_model / "config.json")


def test_a_stopped_run_goes_on(teach, server, train_file):
    """Wherever the files break off, the next run asks for what is missing alone, and ends with the same rows."""
    rows, lines = teach()
    output, progress = train_file.with_name("teacher.jsonl"), train_file.with_name("teacher.jsonl.progress.jsonl")
    whole, whole_progress = output.read_bytes(), progress.read_bytes()
    header = whole_progress.index(b"\n") + 1
    for cut in [*range(0, len(whole), 97), len(whole) - 1]:
        output.write_bytes(whole[:cut])
        server.asked.clear()
        again, _ = teach()
        assert sorted(again, key=str) == sorted(rows, key=str)
        there = whole[:cut].count(b"\n")
        assert len(server.asked) == (there < 2) + (there < 4)
        progress.write_bytes(whole_progress)
    for cut in [*range(header, len(whole_progress), 97), len(whole_progress) - 1]:
        output.write_bytes(whole)
        progress.write_bytes(whole_progress[:cut])
        server.asked.clear()
        again, noted = teach()
        assert sorted(again, key=str) == sorted(rows, key=str) and sorted(noted, key=str) == sorted(lines, key=str)
        assert len(server.asked) == 3 - whole_progress[header:cut].count(b"\n")


def test_what_changed_is_asked_again_and_what_went_is_dropped(teach, server, train_file):
    teach("--limit", "1")
    assert len(server.asked) == 1
    teach()
    assert len(server.asked) == 3  # one of them before
    rows = read_jsonl(train_file)
    rows[1]["title"] = "장비 (삼국지)"
    train_file.write_text(teacher.to_lines(rows[1:3]))
    kept, (_, *lines) = teach()
    assert len(server.asked) == 4
    assert {row["title"] for row in kept} == {"장비 (삼국지)"} and len(kept) == 2
    assert [line["id"] for line in lines] == ["teacher-9-1", "teacher-8-1"]


def test_other_settings_and_other_files_are_refused(teach, train_file, tmp_path):
    output = train_file.with_name("teacher.jsonl")
    output.write_text('{"id": "mine"}\n')
    with pytest.raises(score.UserError) as error:
        teach()
    assert "were not made here" in said_by(error) and output.read_text() == '{"id": "mine"}\n'
    output.unlink()
    teach()
    before = output.read_bytes()
    (tmp_path / "prompt.txt").write_text("{passage}")
    for arguments, what in (
        (("--model", "other"), "another model;"),
        (("--prompt_file", tmp_path / "prompt.txt"), "another prompt;"),
        (("--questions", "3", "--max_new_tokens", "9"), "another questions and max_new_tokens;"),
    ):
        with pytest.raises(score.UserError) as error:
            teach(*arguments)
        assert what in said_by(error) and output.read_bytes() == before
    output.with_name("teacher.jsonl.progress.jsonl").write_text('{"model": "m"}\nx\n')
    with pytest.raises(score.UserError, match="or are damaged"):
        teach()


def test_a_quiz_is_not_given_away(teach, server, tmp_path):
    """No question on 마초's article; none that names 운장, has a reserved form or asks what the quiz asks."""
    about = {
        "withheld": [{"entity": "마초", "article": "마초", "aliases": ["馬超"]}, {"entity": "운장"}],
        "reserved_forms": ["{}은/는 어느 고을 사람인가?"],
    }
    question = {"id": "q", "tier": "B", "question": "장비는 어느 군 사람인가?", "answer": "탁군"}
    (tmp_path / "quiz.jsonl").write_text(teacher.to_lines([{"about": about}, question]))
    rows, (_, *lines) = teach("--quiz", tmp_path / "quiz.jsonl")
    assert [row["id"] for row in rows] == ["teacher-8-1-1"] and rows[0]["messages"][1]["content"] == "조조"
    assert [line["dropped"].get("gives the quiz away") for line in lines] == [3, 1]
    assert not any(PASSAGES["마초"] in body["messages"][0]["content"] for _, _, body in server.asked)


def test_the_examples_of_the_prompt_are_not_kept(teach, tmp_path):
    (tmp_path / "prompt.txt").write_text("질문: 관우의 자는 무엇인가?\n답: 운장\n\n{passage}")
    rows, _ = teach("--prompt_file", tmp_path / "prompt.txt", "--limit", "1")
    assert [row["messages"][0]["content"] for row in rows] == ["관우는 어느 고을 사람인가?"]


def test_a_busy_server_is_asked_again(teach, server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server.failures += [(503, "busy"), (429, "{}")]
    rows, _ = teach("--limit", "1")
    assert len(rows) == 2 and len(server.asked) == 3
    assert not any("Authorization" in headers for _, headers, _ in server.asked)


@pytest.mark.parametrize(
    ("code", "body", "words"),
    [
        (404, '{"error": {"message": "The model `m`\\ndoes not exist."}}', "404 The model `m` does not exist."),
        (400, '{"error": "too long"}', "400 too long"),
        (401, '{"message": "no key"}', "401 no key"),
        (405, "<html>", "405 Method Not Allowed"),
        (200, "<html>", "not a chat completion"),
        (200, '{"choices": []}', "not a chat completion"),
    ],
)
def test_what_a_server_refuses_is_told_at_once(code, body, words, teach, server, tmp_path):
    server.failures += [(code, body)]
    with pytest.raises(score.UserError) as error:
        teach("--batch_size", "1", "--limit", "1")
    assert words in said_by(error) and server.url in said_by(error) and len(server.asked) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


def test_no_server_there(teach, server):
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}/v1"
        with pytest.raises(score.UserError) as error:
            teach("--base_url", url)
    assert f"{url}/chat/completions: Connection refused" in said_by(error)
    server.failures += [(500, "")] * 9
    with pytest.raises(score.UserError, match="500 Internal Server Error"):
        teach("--limit", "1")
    assert len(server.asked) == 1 + len(teacher.WAITS)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "file:///etc/passwd", "http://", "http://a:99999/v1", "http://a b/v1"]
)
def test_bad_addresses(url, teach):
    with pytest.raises(score.UserError) as error:
        teach("--base_url", url)
    assert "--base_url is an address such as" in said_by(error) and url in said_by(error)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--train_file", "no.jsonl"), ("cannot read no.jsonl",)),
        (("--train_file", "data/quiz.jsonl"), ("holds no row of the kind `article`",)),
        (("--quiz", "no.jsonl"), ("cannot read no.jsonl",)),
        (("--prompt_file", "no.txt"), ("cannot read no.txt",)),
        (("--prompt_file", "requirements.txt"), ("needs {passage}",)),
        (("--questions", "0"), ("--questions must be at least 1",)),
        (("--limit", "-1"), ("--limit must be at least 1",)),
        (("--model", "no/model"), ("cannot load no/model", "or a model's name on the hub)")),
    ],
)
def test_mistakes(arguments, words, train_file, tmp_path):
    command = ("tools/teacher.py", "--train_file", train_file, "--output_file", tmp_path / "teacher.jsonl")
    assert_mistake(script(*command, "--model", "m", *arguments, ok=False), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]
