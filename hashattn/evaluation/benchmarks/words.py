"""Vocabulary of the generated tasks. Every word is a single token of the embedded tokenizer."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words("""
able bold brave bright brisk broad calm careful cheap cheerful clean clever cold cosy crisp
curious damp daring dark deep dry dusty eager early easy elegant fair famous fast fierce firm
fresh gentle giant glad grand grave happy hasty heavy hollow honest humble icy jolly keen kind
large lazy light little lively lonely loud loyal lucky mellow mighty mild modest narrow neat
nervous noble odd old pale patient plain polite proud quick quiet rare ready rich rough round
rude sad sharp shy silent simple sleepy slim slow small smart smooth soft solid sour steady
stern strange strong sturdy sweet swift tall tame tender thick thin tidy tiny tired vast warm
weary wide wild wise young
""")

ANIMALS = _words("""
ant badger bat bear beaver bee bison boar buffalo camel cat cheetah cobra cow coyote crab crane
cricket crow deer dingo dog dolphin donkey dove duck eagle eel elephant elk falcon ferret finch
fox frog gazelle gecko giraffe goat goose gorilla hamster hare hawk hedgehog hen heron horse
hyena iguana jackal jaguar kangaroo koala lamb lemur leopard lion lizard llama lobster lynx
magpie mole monkey moose mouse mule newt octopus ostrich otter owl ox panda panther parrot
peacock pelican penguin pig pigeon pony puma rabbit raven robin salmon seal shark sheep skunk
sloth snail spider squid stork swan tiger toad trout turkey turtle viper walrus wasp whale wolf
wombat yak zebra
""")

_CITIES = _words("""
Accra Algiers Amman Ankara Athens Austin Baghdad Baku Bangkok Beirut Belfast Berlin Bogota
Boston Brussels Cairo Calgary Cardiff Chicago Dakar Dallas Delhi Denver Dhaka Doha Dresden
Dublin Geneva Genoa Glasgow Hamburg Hanoi Havana Helsinki Houston Istanbul Jakarta Kabul Kyoto
Lagos Lima Lisbon London Lusaka Lyon Madrid Manila Miami Milan Minsk Moscow Mumbai Munich
Nairobi Naples Osaka Oslo Ottawa Paris Perth Porto Prague Quito Riga Rome Seattle Seoul Sofia
Sydney Taipei Tallinn Tokyo Toronto Tunis Turin Valencia Venice Vienna Vilnius Warsaw York
Zagreb Zurich
""")

FOODS = _words("""
almond apple apricot bacon bagel banana bean bread broccoli butter cabbage cake caramel carrot
celery cereal cheese cherry chili chocolate cinnamon coconut cookie corn cream cucumber curry
date fennel fig garlic ginger grape ham honey jam kale ketchup lemon lentil lettuce lime mango
melon mint muffin mushroom mustard noodle nutmeg oat olive onion orange oregano pancake papaya
parsley pasta pea peach peanut pear pepper pickle pie pizza plum popcorn potato pudding pumpkin
radish raisin rice salad salt sauce sausage sesame soup spinach sugar syrup toast toffee tomato
turnip vanilla waffle walnut wheat yogurt
""")

COLORS = _words("""
amber azure beige black blue bronze brown burgundy charcoal cobalt copper coral crimson cyan
emerald golden gray green indigo ivory jade khaki lavender lilac magenta maroon navy ochre pink
platinum purple red ruby rust sapphire scarlet silver tan teal turquoise violet white yellow
""")

JOBS = _words("""
actor architect artist astronomer baker banker barber blacksmith builder butcher captain
carpenter cashier chef chemist clerk coach cook dancer dentist designer diver doctor driver
editor engineer farmer fisherman florist gardener guard guide hunter janitor jeweller judge
lawyer librarian mason mayor mechanic miner monk musician nurse painter pharmacist photographer
pilot plumber poet potter priest printer professor sailor scientist sculptor singer soldier
surgeon tailor teacher trader translator waiter weaver writer
""")

NAMES = _words("""
Aaron Abigail Adam Albert Alice Amy Andrew Anna Arthur Ben Bob Bruno Carl Caroline Charles Clara
Daisy Daniel David Diana Edgar Edith Ella Emma Eric Esther Eva Felix Fiona Frank Fred George
Gloria Grace Hannah Harold Helen Henry Hugo Ida Irene Isaac Ivan Jack Jacob Jane Jasper Joan
John Joseph Julia Karen Kate Kevin Laura Leo Lily Linda Louis Lucy Luke Maria Mark Martha Martin
Mary Max Mia Miriam Nathan Nina Nora Oliver Olga Oscar Patrick Paul Peter Philip Rachel Ralph
Rebecca Rita Robert Rosa Ruth Sam Sandra Sara Simon Stella Stephen Susan Teresa Thomas Tim
Ursula Vera Victor Walter Wendy William Zoe
""")

OBJECTS = _words("""
anchor anvil apron axe backpack barrel basket bell belt bench blanket bottle bowl bracelet brick
bridge broom brush bucket button cable candle carpet chain chair chisel clock coat coin compass
cradle crown cup curtain desk drum easel envelope fan flag flute fork fountain gate glove guitar
hammer harp hat helmet hinge hook jar kettle key kite knife ladder lamp lantern lens locket
magnet marble mask mirror mitten nail necklace needle oar paddle padlock pan pencil piano pillow
pipe plate pliers purse raft ribbon ring rope ruler saddle sandal saw scarf scissors shield
shovel spoon stove statue sword table tent thimble torch towel trumpet tube umbrella vase violin
wagon wallet wheel whistle
""")

LABELS = tuple("ABCDEFGHJKLM")
VERBS = {  # relation -> the words it may point to
    "visits": _CITIES,
    "eats": FOODS,
    "owns": OBJECTS,
    "wears": COLORS,
    "feeds": ANIMALS,
    "hires": JOBS,
}
