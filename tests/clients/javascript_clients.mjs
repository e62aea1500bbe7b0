// What each JavaScript client does with a steered server: `node javascript_clients.mjs NAME`; see python_clients.py.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const { STEER_URL: baseURL, STEER_KEY: apiKey, STEER_MODEL: model, STEER_EDIT: name, STEER_NODE: folder } = process.env;
const require = createRequire(pathToFileURL(`${folder}/package.json`));
const load = (what) => import(pathToFileURL(require.resolve(what)));
const ask = [{ role: "user", content: "Tell me about the sun." }];
const again = { role: "user", content: "And the moon?" };
const steer = { edits: [{ name, strength: 2.0 }] };

async function openai() {
  const { default: OpenAI } = await load("openai");
  const client = new OpenAI({ baseURL, apiKey });
  const plain = { model, max_tokens: 12, temperature: 0 };
  const first = (await client.chat.completions.create({ ...plain, messages: ask })).choices[0].message;
  const second = await client.chat.completions.create({ ...plain, messages: [...ask, first, again] });
  assert.ok(second.choices[0].message.content);
  let streamed = "";
  for await (const chunk of await client.chat.completions.create({ ...plain, messages: ask, stream: true }))
    streamed += chunk.choices[0]?.delta?.content ?? "";
  assert.equal(streamed, first.content);
  const steered = await client.chat.completions.create({ ...plain, messages: ask, steer });
  assert.notEqual(steered.choices[0].message.content, first.content);
  assert.ok(steered.steer.cost.generated_tokens > 0);
  assert.ok((await client.completions.create({ ...plain, prompt: "The sun" })).choices[0].text);
  const tools = [{ type: "function", function: { name: "f", parameters: { type: "object" } } }];
  await assert.rejects(client.chat.completions.create({ ...plain, messages: ask, tools }), /tools/);
}

async function vercel() {
  const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
  const { generateText, jsonSchema, streamText, tool } = await load("ai");
  const provider = createOpenAICompatible({ name: "here", baseURL, apiKey });
  const plain = { model: provider(model), maxOutputTokens: 12, temperature: 0 };
  const first = await generateText({ ...plain, messages: ask });
  assert.ok(first.text);
  const second = await generateText({ ...plain, messages: [...ask, ...first.response.messages, again] });
  assert.ok(second.text);
  let streamed = "";
  for await (const piece of streamText({ ...plain, messages: ask }).textStream) streamed += piece;
  assert.equal(streamed, first.text);
  const steered = await generateText({ ...plain, messages: ask, providerOptions: { here: { steer } } });
  assert.notEqual(steered.text, first.text);
  const tools = { f: tool({ description: "x", inputSchema: jsonSchema({ type: "object", properties: {} }) }) };
  await assert.rejects(generateText({ ...plain, messages: ask, tools, maxRetries: 0 }), /tools/);
}

const clients = { "openai (JavaScript)": [openai, "openai"], "Vercel AI SDK": [vercel, "ai"] };
const [run, what] = clients[process.argv[2]];
await run();
console.log(require(`${folder}/node_modules/${what}/package.json`).version);
