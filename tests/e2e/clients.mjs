// The same questions as tests/e2e/test_clients.py asks, with OpenAI's client for JavaScript; prints what it was told as JSON.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "show the vm" }];
const common = { model: "words", messages, temperature: 0, max_tokens: 8 };
const told = {};

told.models = (await client.models.list()).data.map((each) => each.id).sort();
const whole = await client.chat.completions.create({ ...common, logprobs: true, top_logprobs: 2 });
told.chat = whole.choices[0].message.content;
told.logprobs = whole.choices[0].logprobs.content.map((each) => each.top_logprobs.length);
told.usage = whole.usage.completion_tokens;

let pieces = "";
let counted = null;
const stream = await client.chat.completions.create({ ...common, stream: true, stream_options: { include_usage: true } });
for await (const event of stream) {
  pieces += event.choices[0]?.delta?.content ?? "";
  counted = event.usage ?? counted;
}
told.stream = pieces;
told.streamUsage = counted.completion_tokens;
told.several = (await client.chat.completions.create({ ...common, temperature: 1, seed: 7, n: 3 })).choices.length;
told.completion = (await client.completions.create({ model: "words", prompt: "show the", temperature: 0, max_tokens: 6 })).choices[0].text;

const response = await client.responses.create({ model: "words", input: "show the vm", temperature: 0, max_output_tokens: 8 });
told.response = response.output_text;
let spoken = "";
const kinds = [];
for await (const event of await client.responses.create({ model: "words", input: "show the vm", temperature: 0, max_output_tokens: 8, stream: true })) {
  kinds.push(event.type);
  if (event.type === "response.output_text.delta") spoken += event.delta;
}
told.spoken = spoken;
told.kinds = [...new Set(kinds)];

const format = {
  type: "json_schema",
  json_schema: { name: "answer", schema: { type: "object", properties: { n: { type: "integer", enum: [4, 5] } }, required: ["n"], additionalProperties: false } },
};
told.json = JSON.parse((await client.chat.completions.create({ ...common, max_tokens: 100, response_format: format })).choices[0].message.content);

const vectors = await client.embeddings.create({ model: "vectors", input: ["list it now", "az vm list one"] });
told.vectors = vectors.data.map((each) => each.embedding.length);
told.first = vectors.data[0].embedding[0];

try {
  await client.chat.completions.create({ ...common, model: "nobody" });
} catch (error) {
  told.missing = [error.status, error.code];
}
try {
  await client.chat.completions.create({ ...common, temperature: 9 });
} catch (error) {
  told.refused = error.status;
}
console.log(JSON.stringify(told));
