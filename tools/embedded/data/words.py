"""Word lists of the generators."""

from __future__ import annotations

WORDS = """apple ball bird blue boat book box bread bridge bus cake candle car castle cat chair cheese clock cloud coat
coffee corn cow cup dance desk dog door dragon dream drum duck eagle earth egg engine farm feather fire fish flag
flower forest fork fox frog garden ghost glass goat gold grape grass green hammer hand hat heart hill honey horse
house ice island jacket jam kettle key king kite knife ladder lake lamp leaf lemon letter light lion lizard map
market milk mirror money moon mouse music nest night north nose ocean onion orange owl paint panda paper park pear
pencil piano pillow pilot planet plate pocket potato queen rabbit rain ring river road robot rocket roof rope rose
sail salt sand school shell ship shirt shoe silver sky snow soap sock song soup spoon star stone storm street sugar
sun sword table tea tiger tower town train tree truck turtle umbrella valley violin wagon wall water whale wheel
wind window winter wolf wood yellow zebra zoo""".split()

NAMES = """Ada Alan Alice Anna Ben Carla Clara Daniel David Diego Elena Emma Eric Eva Felix Finn Grace Hannah Hugo Ida
Ines Jack James Jana Julia Karl Kim Lara Lea Leo Lina Lucas Maria Marta Max Maya Mia Nina Noah Nora Olga Omar Oscar
Paul Peter Rita Rosa Ruth Sam Sara Simon Sofia Theo Tim Tom Vera Victor Yuki Zoe Aisha Alex Amir Andrea Andrew Anton
Antonio Ashley Barbara Bernd Bianca Bob Boris Brandon Brian Bruno Carlos Carol Charles Charlie Chen Chris Christina Cora
Damian Deborah Dennis Dominic Donna Dylan Edward Elias Elif Elizabeth Ella Emil Emily Erik Fatima Fiona Frank Frida
Gabriel George Giulia Gustav Hans Harry Heather Helen Henry Hiroshi Ingrid Irene Isabel Ivan Jacob Jan Jane Jason
Jessica Joe John Jonas Jordan Joseph Karen Kate Kenji Kevin Laura Leila Leon Linda Lisa Liam Louis Lucy Luis Luke Magnus
Marco Margaret Mark Martin Mary Matthew Mei Melissa Michael Mohammed Nadia Natalie Nathan Niklas Nils Olivia Otto Pablo
Pamela Patrick Pedro Philip Priya Rachel Rahul Ralf Rebecca Richard Robert Roman Ryan Sandra Sarah Sebastian Sergei
Stefan Stephanie Steven Susan Sven Tanya Thomas Tina Tobias Ulrich Ursula Valentina Vincent Walter Wei William Xavier
Yara Yusuf Zara""".split()

CITIES = """Paris London Berlin Madrid Rome Vienna Oslo Lisbon Athens Dublin Prague Warsaw Tokyo Cairo Delhi Seoul
Boston Chicago Lima Nairobi Sydney Toronto Zurich Munich Lyon Porto""".split()

COLOURS = "red blue green yellow orange purple pink black gray brown teal gold".split()
