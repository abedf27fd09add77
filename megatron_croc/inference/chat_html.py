"""HTML page of `croc chat --web`, with style and script; it loads no other resource.

MAX_UPLOAD_MIB is replaced by the size limit of a request.
"""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,">
<title>croc chat</title>
<style>
:root { color-scheme: light dark; --line: #8886; --mine: #2a7d4f22; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; height: 100vh; margin: 0 auto;
       padding: 1rem; display: flex; flex-direction: column; gap: .75rem; }
header { display: flex; justify-content: space-between; align-items: center; }
h1 { font-size: 1.1rem; margin: 0; }
main { flex: 1; overflow-y: auto; display: flex; flex-direction: column; gap: .75rem; }
.turn { padding: .6rem .9rem; border-radius: .8rem; white-space: pre-wrap; overflow-wrap: anywhere;
        max-width: 85%; border: 1px solid var(--line); min-height: 2.8rem; }
.human { align-self: flex-end; background: var(--mine); }
.turn img { display: block; max-width: 100%; max-height: 14rem; border-radius: .5rem; }
.note { color: #888; font-size: .85em; }
.error { color: #c0392b; }
form { border: 1px solid var(--line); border-radius: .8rem; padding: .6rem; }
body.drop form { outline: 2px dashed #2a7d4f; }
textarea { width: 100%; border: 0; outline: 0; resize: none; font: inherit; background: none; }
#bar { display: flex; gap: .5rem; align-items: center; }
#chosen { flex: 1; display: flex; gap: .4rem; flex-wrap: wrap; }
#chosen img { height: 3rem; border-radius: .4rem; cursor: pointer; }
button, label.button { font: inherit; padding: .3rem .9rem; border-radius: .6rem; cursor: pointer;
                       border: 1px solid var(--line); background: none; }
#send { background: #2a7d4f; color: #fff; }
.hidden { position: absolute; opacity: 0; width: 1px; height: 1px; }
</style>
<header><h1>croc chat</h1><button id="reset" type="button">Reset</button></header>
<main id="turns" aria-live="polite"></main>
<form id="form">
<textarea id="text" rows="2" aria-label="Question"
 placeholder="Ask; drop an image here. Enter sends, Shift+Enter breaks the line"></textarea>
<div id="bar">
<label class="button">Image<input class="hidden" id="file" type="file" accept="image/*" multiple>
</label><span id="chosen"></span>
<button id="stop" type="button" hidden>Stop</button><button id="send">Send</button>
</div>
</form>
<script>
"use strict";
const at = (id) => document.getElementById(id);
let id = null, images = [], running = null;

function add(kind, text) {
  const box = document.createElement("div");
  box.className = kind;
  box.textContent = text;
  at("turns").append(box);
  box.scrollIntoView();
  return box;
}
function picture(file) {
  const image = document.createElement("img");
  image.src = URL.createObjectURL(file);
  image.alt = file.name;
  return image;
}
function choose(files) {
  const more = [...files].filter((file) => file.type.startsWith("image/"));
  const size = [...images, ...more].reduce((sum, file) => sum + file.size, 0);
  if (size > (MAX_UPLOAD_MIB - 1) * 2 ** 20) {
    add("note error", "the images of a question may have MAX_UPLOAD_MIB MiB: choose smaller ones");
    return;
  }
  images.push(...more);
  show();
}
function show() {
  at("chosen").replaceChildren(...images.map((file) => {
    const image = picture(file);
    image.title = file.name + " (click removes)";
    image.onclick = () => { images = images.filter((other) => other !== file); show(); };
    return image;
  }));
}
async function failure(reply) {
  try { return (await reply.json()).error; } catch { return "error " + reply.status; }
}
async function reset() {
  if (running) running.abort();
  id = null; images = []; show();
  at("turns").replaceChildren();
  at("text").focus();
}
async function send() {
  const text = at("text").value;
  if (running || !text.trim()) return;
  const sent = images, mine = add("turn human", "");
  mine.append(...sent.map(picture), text);
  const box = add("turn model", ""), form = new FormData(), control = new AbortController();
  running = control;
  at("stop").hidden = false; at("send").hidden = true;
  try {
    if (id === null) {
      const made = await fetch("new", { method: "POST", signal: control.signal });
      if (!made.ok) throw new Error(await failure(made));
      id = (await made.json()).id;
    }
    form.append("id", id);
    form.append("text", text);
    for (const file of sent) form.append("images", file, file.name);
    const reply = await fetch("ask", { method: "POST", body: form, signal: control.signal });
    if (!reply.ok) throw new Error(await failure(reply));
    at("text").value = ""; images = []; show();
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\\n");
      rest = lines.pop();
      for (const line of lines) {
        const got = JSON.parse(line);
        if (got.piece) box.append(got.piece);
        if (got.error) throw new Error(got.error);
        if (got.end && !got.is_finished) add("note", "cut off at --max-new-tokens");
        box.scrollIntoView(false);
      }
    }
    box.dataset.done = "true";
  } catch (error) {
    if (error.name === "AbortError") {
      if (box.isConnected) add("note", "stopped");
    } else {
      if (!box.textContent) box.remove();
      add("note error", error.message);
    }
  } finally {
    running = null;
    at("stop").hidden = true; at("send").hidden = false;
  }
}
at("form").onsubmit = (event) => { event.preventDefault(); send(); };
at("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
};
at("file").onchange = () => { choose(at("file").files); at("file").value = ""; };
at("reset").onclick = reset;
at("stop").onclick = () => running && running.abort();
document.ondragover = (event) => { event.preventDefault(); document.body.classList.add("drop"); };
document.ondragleave = () => document.body.classList.remove("drop");
document.ondrop = (event) => {
  event.preventDefault();
  document.body.classList.remove("drop");
  choose(event.dataTransfer.files);
};
</script>
</html>
"""
