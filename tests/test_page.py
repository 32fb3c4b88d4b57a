"""The page to try checkpoints, in a real browser: the answers of generate.py, and nothing from or to outside."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT, read_jsonl, script

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUESTION = "조조는 <script>window.ran = 1</script> 누구인가?"


@pytest.fixture(scope="module")
def page_server(finished_run, tmp_path_factory):
    """tools/page.py on a run of two checkpoints, with a hostile article: (its address, the process)."""
    articles = tmp_path_factory.mktemp("page") / "articles.jsonl"
    text = "조조는 위나라를 세울 터를 닦았다. <img src=x onerror='window.ran = 1'><script>window.ran = 1</script>"
    rows = [{"title": "조조<b>", "text": text}, {"title": "해금", "text": "두 줄로 된 악기다."}]
    articles.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "tools/page.py", "--checkpoint", finished_run, "--base_model", "none"]
    command += ["--articles", articles, "--port", str(port), "--no_browser", "--max_new_tokens", "24"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            until = time.monotonic() + 120
            while not listening(process.pid):
                assert process.poll() is None, process.stdout.read()
                assert time.monotonic() < until
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.terminate()


def listening(pid: int) -> set[str]:
    return {c.laddr.ip for c in psutil.Process(pid).net_connections() if c.status == psutil.CONN_LISTEN}


def test_it_listens_to_this_machine_only(page_server, finished_run):
    address, process = page_server
    assert listening(process.pid) == {"127.0.0.1"}
    port = address.rpartition(":")[2]
    again = script("tools/page.py", "--checkpoint", finished_run, "--no_browser", "--port", port, ok=False)
    assert again.returncode == 2 and f"port {port} is taken" in again.stderr


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_two_checkpoints_side_by_side(page_server, finished_run, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    asked = ("--prompt", QUESTION, "--max_new_tokens", "24", "--output_file", tmp_path / "answers.jsonl")
    script("generate.py", "--checkpoint", finished_run, "--base_model", "none", *asked)
    left, right = (row["answer"] for row in read_jsonl(tmp_path / "answers.jsonl"))
    address, _ = page_server
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        requested = []
        page.on("request", lambda request: requested.append(request.url))
        page.goto(address)
        page.get_by_label("질문").fill(QUESTION)
        page.get_by_role("button", name="묻기").click()
        about = page.locator("#about-2 input, #about-2 textarea").first
        expect(about).to_have_value(re.compile(r"\d+토큰 · "), timeout=60_000)
        assert page.locator("#answer-1 textarea").input_value() == left
        assert page.locator("#answer-2 textarea").input_value() == right
        evidence = page.locator("#evidence")
        assert "조조<b>" in evidence.inner_text() and "위나라를 세울 터" in evidence.locator("mark").inner_text()
        assert "해금" not in evidence.inner_text()
        page.screenshot(path=tmp_path / "page.png")
        assert page.evaluate("window.ran") is None
        assert all(url.startswith((address, "data:", "blob:")) for url in requested), requested
        browser.close()
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_mistakes(finished_run, tmp_path):
    for wrong, told in (
        (("--checkpoint", tmp_path / "none"), "there is no checkpoint"),
        (("--checkpoint", finished_run, "--articles", tmp_path / "none.jsonl"), "none.jsonl"),
        (("--checkpoint", finished_run, "--max_new_tokens", "0"), "--max_new_tokens must be from 1"),
        (("--checkpoint", finished_run, "--port", "99999"), "--port must be from 1 to 65535"),
    ):
        result = script("tools/page.py", "--port", "7861", *wrong, "--no_browser", ok=False)
        assert result.returncode == 2 and told in result.stderr and "Traceback" not in result.stderr, result.stderr
