#!/usr/bin/env bash
# What curl says to a steered server, plain and steered; see python_clients.py.
set -euo pipefail

post() { curl --silent --show-error "$STEER_URL/$1" -H "Authorization: Bearer $STEER_KEY" "${@:2}"; }
json=(-H "Content-Type: application/json")
plain='"model": "'$STEER_MODEL'", "max_tokens": 12, "temperature": 0, "messages": [{"role": "user", "content": "Hello."}]'
steer='"steer": {"edits": [{"name": "'$STEER_EDIT'", "strength": 2.0}]}'

post chat/completions "${json[@]}" -d "{$plain}" | grep --quiet '"content"'
post chat/completions "${json[@]}" -d "{$plain, $steer}" | grep --quiet '"generated_tokens"'
post chat/completions "${json[@]}" --no-buffer -d "{$plain, \"stream\": true}" | grep --quiet 'data: \[DONE\]'
post chat/completions -d "{$plain}" | grep --quiet 'allowed: application/json'
post responses "${json[@]}" -d '{"input": "x"}' | grep --quiet '/v1/chat/completions and /v1/completions'
curl --version | head -n 1 | cut -d ' ' -f 2
