"""An HTTP API that OpenAI's clients can talk to: `/v1/chat/completions` and `/v1/models`.

app         the HTTP server: routes, health, how it starts and ends
boundary    what is around every request: who calls, errors, reports; and its reply
chat        a chat completion, from the request to the last byte of its answer
request     what a request asks of us, and what of it is passed on; pure
answer      what we have to say of an answer: headers, usage, answers and chunks of our own; pure
models      the models that can be asked
errors      our errors in the shape that OpenAI gives its own
members     where in a JSON object each of its members is; pure

And a web page, which is in `static`:

page           its routes, and what it asks of the server
page_request   what it asks; pure
page_json      what it is told; pure
page_files     its files, and what browsers are told of them
"""
