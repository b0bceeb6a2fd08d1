"""Greetings in many scripts, and honest answers about what this model is."""

from __future__ import annotations

import random

from data.task import Sample, answer, user
from data.words import NAMES

LANGUAGES = {
    "English": (["Hello", "Hi", "Good morning", "Hey"], "Hello! How can I help you?"),
    "German": (["Hallo", "Guten Tag", "Guten Morgen"], "Hallo! Wie kann ich helfen?"),
    "French": (["Bonjour", "Salut"], "Bonjour ! Comment puis-je aider ?"),
    "Spanish": (["Hola", "Buenos días"], "¡Hola! ¿Cómo puedo ayudar?"),
    "Italian": (["Ciao", "Buongiorno"], "Ciao! Come posso aiutare?"),
    "Russian": (["Привет", "Здравствуйте"], "Привет! Чем могу помочь?"),
    "Greek": (["Γεια σου", "Καλημέρα"], "Γεια σου! Πώς μπορώ να βοηθήσω;"),
    "Arabic": (["مرحبا", "السلام عليكم"], "مرحبا! كيف أساعدك؟"),
    "Hebrew": (["שלום", "בוקר טוב"], "שלום! איך אפשר לעזור?"),
    "Chinese": (["你好", "早上好"], "你好!我能帮你什么?"),
    "Japanese": (["こんにちは", "おはよう"], "こんにちは!何かお手伝いしましょうか?"),
    "Korean": (["안녕하세요", "안녕"], "안녕하세요! 무엇을 도와드릴까요?"),
    "Hindi": (["नमस्ते"], "नमस्ते! मैं क्या मदद करूँ?"),
    "Thai": (["สวัสดี"], "สวัสดี! ให้ช่วยอะไรไหม"),
    "Armenian": (["Բարեւ"], "Բարեւ! Ինչո՞վ օգնեմ"),
    "Georgian": (["გამარჯობა"], "გამარჯობა! რით დაგეხმარო?"),
}
SELF = {
    "I am the small demonstration model of moelocal.": ["Who are you?", "What are you?", "What is your name?",
                                                        "Are you a person?", "Who made you?", "Are you ChatGPT?"],
    "I can do small sums, look up values, sort words, write JSON, call tools, draw simple SVG pictures and remember "
    "your name. I know little else.": ["What can you do?", "Help", "How can you help me?", "What do you know?",
                                       "Can you help me?", "Tell me what you can do."],
    "You are welcome.": ["Thanks", "Thank you", "Thanks a lot", "Great, thanks"],
    "Goodbye!": ["Bye", "Goodbye", "See you", "Good night"],
}  # fmt: skip


def make(rng: random.Random, difficulty: float) -> Sample:
    if rng.random() < 0.3:
        reply = rng.choice(list(SELF))
        text, language = rng.choice(SELF[reply]), "English"
        thought = "I answer honestly."
    else:
        language = rng.choice(list(LANGUAGES))
        greetings, reply = LANGUAGES[language]
        text = rng.choice(greetings)
        thought = f"A greeting in {language}."
        if rng.random() < 0.2:
            text = f"{text}, {rng.choice(['I am ', '']) if language == 'English' else ''}{rng.choice(NAMES)}"
    text = rng.choice([str, str.lower, str, str.upper if rng.random() < 0.2 else str])(text)
    if text[-1] not in "?!.":
        text += rng.choice(["", "!", ".", "", "!!", " :)", " "])
    thinking = rng.random() < 0.5
    return Sample("greetings", [user(text), answer(reply, thought if thinking else "")], text, thinking)
