// Have a real llama.cpp answer prompts: {"llama", "models", "prompts", "maxTokens"} on stdin, answers on stdout, one
// list a model. The most likely token each time, on the CPU.
import {readFileSync} from "node:fs";
import path from "node:path";
import {pathToFileURL} from "node:url";

const {llama: folder, models, prompts, maxTokens} = JSON.parse(readFileSync(0, "utf8"));
const entry = path.join(folder, "node_modules/node-llama-cpp/dist/index.js");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(entry));
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: 1});

async function answer(model, sequence, prompt) {
    const tokens = model.tokenize(prompt, true);
    const answered = [];
    await sequence.clearHistory();
    for await (const token of sequence.evaluate(tokens, {temperature: 0, yieldEogToken: true})) {
        answered.push(token);
        if (model.isEogToken(token) || answered.length === maxTokens) break;
    }
    return {prompt: tokens, tokens: answered, text: model.detokenize(answered, true)};
}

const answers = [];
for (const modelPath of models) {
    const model = await llama.loadModel({modelPath, checkTensors: true});
    const context = await model.createContext({contextSize: 512});
    const sequence = context.getSequence();
    const found = [];
    for (const prompt of prompts) found.push(await answer(model, sequence, prompt));
    answers.push(found);
    await model.dispose();
}
process.stdout.write(JSON.stringify(answers), () => process.exit(0));
