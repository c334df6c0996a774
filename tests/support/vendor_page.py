"""The snippets of the vendor's page as they stand there (only their line breaks, which the page's text has lost, are
back), and how they are made to run: the base URL, the key, straight quotes, and what the page leaves out.
"""

from __future__ import annotations

BASE_URL = "https://api.aiexport.io/v2"
KEY = "axp_live_••••••••••••"

CURL = """\
# Every request needs this header
curl https://api.aiexport.io/v2/messages \\
  -H “X-API-Key: axp_live_••••••••••••” \\
  -H “Content-Type: application/json”
"""
CREATE_MESSAGE = """\
const response = await fetch(“https://api.aiexport.io/v2/messages”, { method: “POST”, headers: \
{ “X-API-Key”: process.env.API_KEY, “Content-Type”: “application/json” }, body: JSON.stringify({ \
model: “apex-sonnet-4-20250501”, max_tokens: 1024, messages: [{ role: “user”, content: “Hello!” }] }) });
"""
LIST_MODELS = """\
const models = await fetch(“https://api.aiexport.io/v2/models”, { headers: \
{ “X-API-Key”: process.env.API_KEY } }).then(r => r.json());
"""
STREAM = """\
const res = await fetch(“https://api.aiexport.io/v2/messages/stream”, { method: “POST”, headers: \
{ “X-API-Key”: process.env.API_KEY }, body: JSON.stringify({ model: “apex-opus-3-20250401”, stream: true, … }) });
const reader = res.body.getReader();
while (true) {
  const { done, value } = await reader.read();
  if (done) break;
  // Decode and process SSE chunks
  console.log(new TextDecoder().decode(value));
}
"""
CREATE_BATCH = """\
const batch = await fetch(“https://api.aiexport.io/v2/batch”, { method: “POST”, headers: \
{ “X-API-Key”: process.env.API_KEY }, body: JSON.stringify({ requests: [ \
{ model: “apex-haiku-4-20250401”, messages: […] }, { model: “apex-haiku-4-20250401”, messages: […] } ] }) });
"""
CANCEL_BATCH = """\
await fetch(`https://api.aiexport.io/v2/batch/${batchId}/cancel`, { method: “DELETE”, headers: \
{ “X-API-Key”: process.env.API_KEY } });
"""
JSON_MODE = 'response_format: { type: "json_object" }'

_MESSAGES = '[{ role: "user", content: "Hello!" }]'


def filled_in(snippet: str, base_url: str, key: str) -> str:
    """The snippet as a reader of the page would run it against `base_url`, which ends in /v2."""
    return (
        snippet.replace(BASE_URL, base_url)
        .replace(KEY, key)
        .replace("“", '"')
        .replace("”", '"')
        .replace("[…]", _MESSAGES)
        .replace("…", f"max_tokens: 60, messages: {_MESSAGES}")
    )
