"""Call the right tool with the right arguments, and say in words what it answered."""

from __future__ import annotations

import random
from typing import Any

from data.task import Sample, answer, user
from data.words import CITIES, NAMES, WORDS


def tool(name: str, description: str, **properties: str) -> dict[str, Any]:
    schema = {key: {"type": kind} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": schema, "required": list(properties)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


TOOLS = {
    "get_weather": tool("get_weather", "Weather of a city", city="string"),
    "set_timer": tool("set_timer", "Start a timer", minutes="integer"),
    "send_message": tool("send_message", "Send a message", to="string", text="string"),
    "convert": tool("convert", "Convert euros", amount="integer", currency="string"),
    "search": tool("search", "Search files", query="string"),
}
CURRENCIES = ["dollars", "yen", "pounds"]
Turn = tuple[str, dict[str, Any], str, str]


def weather(rng: random.Random) -> Turn:
    city, sky, degrees = (
        rng.choice(CITIES),
        rng.choice(["sunny", "rainy", "cloudy", "windy"]),
        rng.randint(-5, 35),
    )
    ask = rng.choice(["What is the weather in {}?", "Weather in {}?", "How is the weather in {} today?",
                      "Is it nice in {} now?"])  # fmt: skip
    return (
        ask.format(city),
        {"city": city},
        f"{sky}, {degrees}",
        f"In {city} it is {sky} with {degrees} degrees.",
    )


def timer(rng: random.Random) -> Turn:
    minutes = rng.randint(2, 90)
    ask = rng.choice(["Set a timer for {} minutes.", "Timer: {} minutes", "Wake me in {} minutes.",
                      "Start a {} minute timer please."])  # fmt: skip
    return ask.format(minutes), {"minutes": minutes}, "ok", f"The timer is set to {minutes} minutes."


def message(rng: random.Random) -> Turn:
    to, text = rng.choice(NAMES), " ".join(rng.sample(WORDS, 2))
    ask = rng.choice(["Send {n} the message: {t}", "Tell {n}: {t}", "Message to {n}: {t}"])
    return ask.format(n=to, t=text), {"to": to, "text": text}, "sent", f"I sent {to} the message: {text}"


def convert(rng: random.Random) -> Turn:
    amount, currency, result = rng.randint(2, 300), rng.choice(CURRENCIES), rng.randint(2, 900)
    ask = rng.choice(["How much are {a} euros in {c}?", "Convert {a} euros to {c}.", "{a} euros in {c}?"])
    return (ask.format(a=amount, c=currency), {"amount": amount, "currency": currency}, str(result),
            f"{amount} euros are {result} {currency}.")  # fmt: skip


def search(rng: random.Random) -> Turn:
    query, found = rng.choice(WORDS), f"{rng.choice(WORDS)}.txt"
    ask = rng.choice(["Find the file about {}.", "Search my files for {}.", "Where did I write about {}?"])
    return ask.format(query), {"query": query}, found, f"I found {found}."


MAKERS = {
    "get_weather": weather,
    "set_timer": timer,
    "send_message": message,
    "convert": convert,
    "search": search,
}


def make(rng: random.Random, difficulty: float) -> Sample:
    name = rng.choice(list(MAKERS))
    ask, arguments, response, words = MAKERS[name](rng)
    others = rng.sample([t for t in TOOLS if t != name], rng.randint(0, 2 if difficulty > 0.3 else 1))
    offered = [TOOLS[t] for t in [name, *others]]
    rng.shuffle(offered)
    thinking = rng.random() < 0.5
    thought = f"I need {name}." if thinking else ""
    call = answer("", thought, [{"type": "function", "function": {"name": name, "arguments": arguments}}])
    messages = [user(ask), call]
    if rng.random() < 0.45:
        messages += [
            {"role": "tool", "content": response},
            answer(words, f"It says {response}." if thinking else ""),
        ]
    return Sample("tools", messages, f"{name}/{sorted(arguments.items())}", thinking, offered)
