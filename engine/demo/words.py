"""The word lists that the generators draw from."""

# ruff: noqa: SIM905

from __future__ import annotations

ANIMALS = (
    "fox cat dog rabbit mouse bear owl hedgehog squirrel turtle frog duck goose horse pony cow sheep goat pig hen "
    "lion tiger elephant monkey giraffe zebra penguin seal whale dolphin otter beaver badger wolf deer raccoon "
    "robin sparrow crow parrot swan snail bee ant butterfly spider ladybug dragon unicorn kitten puppy lamb bat "
    "mole crab octopus panda koala kangaroo camel llama hamster lizard moth"
).split()

PEOPLE = (
    "girl boy knight princess prince wizard witch pirate baker farmer sailor robot giant king queen gardener painter "
    "astronaut teacher fisherman shepherd inventor clown miller tailor ghost fairy elf gnome shopkeeper"
).split()

SHE = (
    "Anna Lily Ruby Mia Emma Nora Ella Zoe Ivy Rosa Clara Lucy Daisy Maya Luna Hazel Alice Sara Tilly Wendy Nina "
    "Olga Paula Greta Ada Grace Molly Poppy Bella Sophie"
).split()
HE = (
    "Tom Max Ben Leo Sam Finn Oscar Hugo Felix Milo Jack Theo Otto Pip Rufus Barnaby Henry Arthur Noah Simon Peter "
    "Carl Emil Bruno Toby Charlie Gus Oliver Jonas Walter"
).split()

PLACES = {
    "forest": "in", "castle": "in", "village": "in", "garden": "in", "cave": "in", "valley": "in", "meadow": "in",
    "lighthouse": "in", "town": "in", "city": "in", "swamp": "in", "desert": "in", "jungle": "in", "windmill": "in",
    "library": "in", "treehouse": "in", "cottage": "in", "harbor": "in", "school": "in", "kitchen": "in",
    "island": "on", "mountain": "on", "farm": "on", "hill": "on", "ship": "on", "beach": "on", "cloud": "on",
    "boat": "on", "river": "by", "lake": "by", "sea": "by", "pond": "by", "spaceship": "in", "tower": "in",
}  # fmt: skip
"""A place and the word that goes before it."""

OBJECTS = (
    "key lantern kite ball book map hat bell boat drum flute mirror coin ring button scarf umbrella clock basket "
    "feather shell stone acorn apple cake pie cookie candle ladder bucket telescope compass crown cup spoon teapot "
    "pumpkin balloon bicycle wagon star seed rose letter box treasure sword violin whistle blanket pearl carrot "
    "computer radio pencil paintbrush shoe boot egg"
).split()

QUALITIES = (
    "small brave kind shy clever curious cheerful gentle quiet lazy hungry young old proud friendly lonely".split()
)
COLORS = "red blue green yellow orange purple white black brown pink gray golden silver".split()
FRUITS = "apple banana cherry pear plum grape lemon orange peach mango strawberry melon kiwi fig".split()
FOODS = "bread soup pizza rice cheese salad pasta honey pancakes cake porridge noodles stew".split()
VEGETABLES = "carrot potato tomato onion pea bean cabbage pepper spinach leek corn".split()
MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
JOBS = "teacher baker doctor farmer nurse engineer writer painter pilot cook sailor gardener singer driver".split()
HOBBIES = "reading swimming chess cooking music dancing drawing running fishing hiking painting gardening".split()
SURNAMES = "Miller Brown Stone Hill Wood Baker Green Young Fisher Cook Gray Lake Marsh Field Fox Winter".split()
COMPANIES = "Northwind Bluebird Redwood Sunrise Harbor Maple Summit Lantern Copper Willow".split()
LANGUAGES = "English French German Spanish Italian Dutch Polish Swedish Japanese Chinese Korean Arabic Hindi".split()

CITIES = {
    "Paris": "France", "Berlin": "Germany", "Rome": "Italy", "Madrid": "Spain", "London": "England", "Tokyo": "Japan",
    "Oslo": "Norway", "Vienna": "Austria", "Lisbon": "Portugal", "Dublin": "Ireland", "Athens": "Greece",
    "Cairo": "Egypt", "Warsaw": "Poland", "Prague": "Czechia", "Stockholm": "Sweden", "Helsinki": "Finland",
    "Ottawa": "Canada", "Lima": "Peru", "Delhi": "India", "Beijing": "China", "Seoul": "Korea", "Nairobi": "Kenya",
    "Boston": "USA", "Chicago": "USA", "Hamburg": "Germany", "Lyon": "France", "Milan": "Italy", "Sydney": "Australia",
}  # fmt: skip

PLAIN = (
    "hello world yes no ok okay ping pong banana apple sun moon star rain snow wind fire water earth tree flower "
    "house door window table chair bread butter milk sugar salt river ocean bridge road train plane car bicycle "
    "music song dance game book paper pen glass bottle clock light dark summer winter spring autumn morning evening "
    "night today tomorrow happy sad quick brown lazy dog cat bird fish horse friend family city country mountain "
    "test testing hola bonjour ready done stop go start finish one two three four five six seven eight nine ten "
    "alpha beta gamma delta token model server stream hello goodbye thanks please sorry welcome rainbow potato "
    "purple elephant umbrella pineapple keyboard mouse screen coffee tea juice lemon orange"
).split()

SUBJECTS = (
    "the cat;the dog;my sister;the old man;a small bird;the teacher;our neighbor;the king;a robot;the train;the moon;"
    "my friend;the baker;a big horse;the queen;this machine;the river;nobody;everybody;the quick brown fox"
).split(";")
VERBS = (
    "likes;sees;wants;finds;carries;paints;hears;needs;follows;watches;eats;loves;forgets;opens;sells;jumps over;"
    "looks at;talks about;waits for;dreams of"
).split(";")
THINGS = (
    "the red ball;a warm soup;the green hill;an old song;the blue door;two apples;the lazy dog;the long road;a letter;"
    "the bright star;some bread;the winter;a new bicycle;the open window;the sea;three keys;a good book;the garden"
).split(";")
TAILS = ["", "", "", " today", " in the morning", " every day", " at night", " with a smile", " in the rain", " again"]

TOPICS = (
    "quantum physics;photosynthesis;black holes;the French Revolution;the stock market;inflation;the Roman Empire;"
    "evolution;gravity;machine learning;neural networks;blockchain;climate change;football;basketball;the Olympics;"
    "Napoleon;Shakespeare;Mozart;Albert Einstein;the pyramids;dinosaurs;volcanoes;the human heart;vitamins;diabetes;"
    "chess openings;World War II;democracy;philosophy;the meaning of life;electric cars;nuclear power;vaccines;"
    "the moon landing;Mars;the speed of light;atoms;DNA;bacteria;the internet;Linux;Windows;compilers;databases;"
    "Kubernetes;Docker;JavaScript;Rust;C++;the weather in London;tax law;contracts;mortgages;insurance;cooking rice;"
    "baking bread;wine;coffee;yoga;running shoes;knitting;guitars;jazz;opera;film history;painting;architecture;"
    "bridges;ships;airplanes;trains;whales;penguins;tigers;mushrooms;roses;trees;rivers;oceans;deserts;mountains;"
    "Africa;Asia;Brazil;Japan;Germany;Canada;the United Nations;the European Union;elections;presidents;economics;"
    "algebra;geometry;calculus;prime numbers;statistics;probability;logic;grammar;poetry;Latin;Greek;astronomy;"
    "chemistry;biology;geology;psychology;sleep;dreams;memory;happiness;love;friendship;history;religion;law"
).split(";")
